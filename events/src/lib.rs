//! What was committed, told to whoever asks: who came online, who was seen, who is gone.
//!
//! An [`Emitter`] tells it on an [`Exchange`] and never makes who tells wait; a [`Subscriber`] hears
//! it. What is told may be lost, and the table is what counts: a subscriber is told when it may have
//! missed something, and then looks there. `docs/events.md` is the format for everybody else.

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
pub use message::text_of;
pub use subscriber::{Notice, Subscriber};

/// Whether events go out or come in: `Ok`, or why not, in words for an operator.
pub type LinkStatus = Result<(), String>;

/// What has become of some objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// They were not in the table before.
    Online,
    /// They were in the table, and were seen again.
    Seen,
    /// They have left the table.
    Gone,
}

impl Kind {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Online, Self::Seen, Self::Gone];

    /// Its name, which is also the routing key.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Seen => "seen",
            Self::Gone => "gone",
        }
    }
}

/// An object as it was committed, or, if it is gone, as it was last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// The object.
    pub id: i64,
    /// When it was last seen by the database's clock, to the microsecond.
    pub last_seen: SystemTime,
}
