//! The queue and nothing else: what a message is, where it lies, how it is published, delivered,
//! tried again and given up.
//!
//! A [`Publisher`] confirms a batch of ids once the broker has all of it on disk. A [`Consumer`]
//! hands out [`Delivery`]s, each of which is settled with a [`Disposition`]. Both look after their
//! own connection: they reconnect for as long as it takes and tell by their status how it stands.

mod config;
mod consumer;
mod delivery;
mod link;
mod message;
mod publisher;
mod retry;
mod topology;

pub use config::{AmqpUri, Config, QueueType};
pub use consumer::Consumer;
pub use delivery::{Delivery, Disposition, Settled};
pub use message::DecodeError;
pub use publisher::{PublishError, Publisher};

/// Whether the broker takes and gives messages: `Ok`, or why not, in words for an operator.
pub type LinkStatus = Result<(), String>;
