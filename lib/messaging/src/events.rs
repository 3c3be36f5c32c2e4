//! Events about committed changes: objects that came online, were seen again, or are gone. Further
//! events are about objects that a consumer has given up, and about groups of objects.
//!
//! An [`Emitter`] publishes events on an [`Exchange`] without ever waiting; a [`Subscriber`]
//! receives them. Events may be lost, and the table is authoritative: a subscriber is notified when
//! it may have missed events, and then reads the table. `docs/events.md` documents the format for
//! other programs.

mod amqp;
mod change;
mod config;
mod emitter;
mod exchange;
mod gap_detector;
mod group_change;
mod message;
mod subscriber;

pub use change::{GivenUp, Kind, Notification, Object};
pub use config::Config;
pub use emitter::Emitter;
pub use exchange::Exchange;
pub use group_change::{GroupCause, GroupChange};
pub use message::format_time;
pub use subscriber::Subscriber;
