//! The queue, on RabbitMQ or in a file: how messages are published, delivered, retried and given
//! up.
//!
//! [`Config::open`] opens the [`Broker`]. A [`Publisher`] confirms a batch of ids once the broker
//! has all of its messages on disk. A [`Consumer`] yields [`Delivery`]s, each of which is settled
//! with a [`Disposition`]. Each publisher and each consumer has its own connection, reconnects
//! until it succeeds, and reports the state of its connection as its status. While the broker is
//! away, a [`Spool`] stores messages on the local disk.

mod amqp;
mod broker;
mod config;
mod consumer;
mod dead_letter;
mod delivery;
mod disposition;
mod error;
mod gauges;
mod inspector;
mod message;
mod origin;
mod publisher;
mod retry;
mod spool;
mod sqlite;

pub use crate::amqp::BrokerUrl;
pub use broker::{Broker, Destination};
pub use config::{Config, QueueConfig, QueueType};
pub use consumer::{Consumer, Prefetch};
pub use dead_letter::{DeadLetter, DeadLetterAction, Selection};
pub use delivery::Delivery;
pub use disposition::{Disposition, Settled};
pub use error::{InspectError, PublishError};
pub use gauges::Depths;
pub use inspector::Inspector;
pub use message::DecodeError;
pub use origin::Origin;
pub use publisher::Publisher;
pub use spool::{Spool, SpoolError, Spooled};
pub use sqlite_file::OpenError;
