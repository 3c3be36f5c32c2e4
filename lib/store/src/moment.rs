//! Points in time by the database's clock.

use std::time::{Duration, SystemTime};

/// A point in time by the database's clock. That clock may be wrong, and it jumps when it is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    /// Never before 1970.
    pub(crate) since_1970: Duration,
}

impl Moment {
    /// The cutoff by which rows are stale if they were last seen more than `age` before this reading
    /// of the clock.
    #[must_use]
    pub fn before(self, age: Duration) -> Cutoff {
        Cutoff { oldest: self.minus(age), age }
    }

    /// The moment `age` before this one, but not before 1970.
    #[must_use]
    pub fn minus(self, age: Duration) -> Self {
        Self { since_1970: self.since_1970.saturating_sub(age) }
    }

    /// The time since `earlier`; zero if `earlier` is later.
    #[must_use]
    pub fn ahead_of(self, earlier: Self) -> Duration {
        self.since_1970.saturating_sub(earlier.since_1970)
    }

    /// The moment as a `SystemTime`, to the microsecond.
    #[must_use]
    pub fn time(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + self.since_1970
    }

    /// Microseconds since 1970.
    #[must_use]
    pub fn micros(self) -> i64 {
        i64::try_from(self.since_1970.as_micros()).unwrap_or(i64::MAX)
    }

    /// Converts microseconds since 1970. A negative number counts as 1970.
    #[must_use]
    pub fn from_micros(since_1970: i64) -> Self {
        Self { since_1970: Duration::from_micros(since_1970.try_into().unwrap_or(0)) }
    }

    /// Converts milliseconds since 1970. A negative number counts as 1970.
    pub(crate) fn from_millis(since_1970: i64) -> Self {
        Self { since_1970: Duration::from_millis(since_1970.try_into().unwrap_or(0)) }
    }
}

/// Which rows are stale: those last seen before `oldest`, which is a reading of the clock minus
/// `age`.
///
/// Statements use the earlier of `oldest` and their own time minus `age`. So a clock that is set
/// ahead after the reading makes no row stale. If it is set back, neither are rows that are written
/// by the new time.
#[derive(Clone, Copy, Debug)]
pub struct Cutoff {
    pub(crate) oldest: Moment,
    pub(crate) age: Duration,
}
