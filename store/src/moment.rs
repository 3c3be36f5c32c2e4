//! What the database's clock says.

use std::time::{Duration, SystemTime};

/// A reading of the database's clock, which may be right or wrong, and may be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment {
    /// None lies before 1970.
    pub(crate) since_1970: Duration,
}

impl Moment {
    /// So long before, but not before 1970.
    #[must_use]
    pub fn before(self, age: Duration) -> Self {
        Self { since_1970: self.since_1970.saturating_sub(age) }
    }

    /// How far this one is ahead of `earlier`; zero if it is not.
    #[must_use]
    pub fn ahead_of(self, earlier: Self) -> Duration {
        self.since_1970.saturating_sub(earlier.since_1970)
    }

    /// The same as the operating system's time, to the microsecond.
    #[must_use]
    pub fn time(self) -> SystemTime {
        SystemTime::UNIX_EPOCH + self.since_1970
    }

    /// From what both databases keep, though in other units. What lies before 1970 counts as 1970.
    pub(crate) fn from_micros(since_1970: i64) -> Self {
        Self { since_1970: Duration::from_micros(since_1970.try_into().unwrap_or(0)) }
    }
}
