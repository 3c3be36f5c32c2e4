//! The queue on a RabbitMQ.

mod acks;
mod consumer;
mod delivery;
mod depths;
mod expired;
mod history;
mod inspector;
mod link;
mod look;
mod publisher;
mod topology;
mod unsettled;

pub(crate) use consumer::Consumer;
pub(crate) use delivery::Delivery;
pub(crate) use inspector::Inspector;
pub(crate) use publisher::Publisher;

use ::amqp::Access;

use crate::config::QueueConfig;

/// Which broker, and which queue on it.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) access: Access,
    pub(crate) queue: QueueConfig,
}
