//! The queue on RabbitMQ.

mod ack_batcher;
mod consumer;
mod delivery;
mod depths;
mod expiry_check;
mod history;
mod inspector;
mod link;
mod publisher;
mod queue_monitor;
mod topology;
mod unsettled;

pub(crate) use consumer::Consumer;
pub(crate) use delivery::Delivery;
pub(crate) use inspector::Inspector;
pub(crate) use publisher::Publisher;

use ::amqp::Access;

use crate::config::QueueConfig;

/// The broker and the queue on it.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) access: Access,
    pub(crate) queue: QueueConfig,
}
