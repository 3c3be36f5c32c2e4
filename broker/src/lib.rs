//! The queue, on RabbitMQ or in a file: how messages are published, delivered, retried and given
//! up.
//!
//! A [`Publisher`] confirms a batch of ids once the broker has all of its messages on disk. A
//! [`Consumer`] yields [`Delivery`]s, each of which is settled with a [`Disposition`]. Both have
//! their own connections: they reconnect until they succeed, and report the state by their status.
//! While the broker is away, a [`Spool`] stores messages on the local disk.

mod amqp;
mod config;
mod consumer;
mod delivery;
mod gauges;
mod inspector;
mod message;
mod origin;
mod publisher;
mod retry;
mod spool;
mod sqlite;

pub use ::amqp::backoff;
pub use config::{BrokerUrl, Claim, Config, Destination, QueueConfig, QueueType};
pub use consumer::Consumer;
pub use delivery::{Delivery, Disposition, Settled};
pub use embedded::{OpenError, WriteError};
pub use inspector::{DeadLetter, DeadLetterAction, Depths, InspectError, Inspector, Selection};
pub use message::DecodeError;
pub use origin::Origin;
pub use publisher::{PublishError, Publisher};
pub use spool::{Spool, SpoolError, Spooled};

/// Whether the broker accepts or delivers messages: `Ok`, or the reason why not, worded for an
/// operator.
pub type LinkStatus = Result<(), String>;
