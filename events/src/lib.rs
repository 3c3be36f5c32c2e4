//! Events about committed changes: objects that came online, were seen again, or are gone.
//!
//! An [`Emitter`] publishes events on an [`Exchange`] without ever waiting; a [`Subscriber`]
//! receives them. Events may be lost, and the table is authoritative: a subscriber is notified when
//! it may have missed events, and then reads the table. `docs/events.md` documents the format for
//! other programs.

mod config;
mod emitter;
mod exchange;
mod gap_detector;
mod message;
mod rabbit;
mod subscriber;

use std::time::SystemTime;

pub use config::{Config, EventsUrl};
pub use emitter::Emitter;
pub use exchange::Exchange;
pub use message::format_time;
pub use subscriber::{Notification, Subscriber};

/// Whether events can be published or received: `Ok`, or the reason why not, worded for an
/// operator.
pub type LinkStatus = Result<(), String>;

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

/// An object as it was committed; for one that is gone, its last row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// The object's id.
    pub id: i64,
    /// When the object was last seen, by the database's clock, to the microsecond.
    pub last_seen: SystemTime,
}
