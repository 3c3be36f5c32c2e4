//! What the database's clock says.

use std::time::Duration;

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
}
