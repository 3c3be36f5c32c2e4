//! A change of the table, an object that was given up, and the notifications about them that a
//! subscriber receives.

use std::time::SystemTime;

/// The kind of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The objects were not in the table before.
    Online,
    /// The objects were in the table, and were seen again.
    Seen,
    /// The objects were deleted from the table.
    Gone,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Online, Self::Seen, Self::Gone];

    /// The name, which is also the routing key.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Seen => "seen",
            Self::Gone => "gone",
        }
    }
}

/// An object as it was committed; for an object that is gone, its last row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// The object's id.
    pub id: i64,
    /// When the object was last seen, by the database's clock, to the microsecond.
    pub last_seen: SystemTime,
}

/// An object that a consumer has given up: its message is a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GivenUp {
    /// The object's id.
    pub id: i64,
    /// When the dead letter was stored, by the consumer's clock, to the microsecond.
    pub at: SystemTime,
}

/// What a subscriber receives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notification {
    /// These objects have changed.
    Committed(Kind, Vec<Object>),
    /// Consumers have given up these objects. The table has not changed.
    GivenUp(Vec<GivenUp>),
    /// Changes may have been committed for which no event will arrive, so the subscriber has to
    /// read the table. The text is the reason. Each subscription begins with this notification.
    Missed(String),
}
