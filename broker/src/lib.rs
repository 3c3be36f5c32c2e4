//! The queue and nothing else: what a message is, where it lies, how it is published, delivered,
//! tried again and given up.
//!
//! A [`Publisher`] confirms a batch of ids once the broker has all of it on disk. A [`Consumer`]
//! hands out [`Delivery`]s, each of which is settled with a [`Disposition`]. Both look after their
//! own connection: they reconnect for as long as it takes and tell by their status how it stands.
//! What no broker takes for now can wait in a [`Spool`] on this machine's disk.

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
pub use inspector::{DeadLetter, Depths, InspectError, Inspector, Selection, Treatment};
pub use message::DecodeError;
pub use origin::Origin;
pub use publisher::{PublishError, Publisher};
pub use spool::{Spool, SpoolError, Spooled};

/// Whether the broker takes and gives messages: `Ok`, or why not, in words for an operator.
pub type LinkStatus = Result<(), String>;
