//! The queue on RabbitMQ.

mod ack_batcher;
mod consumer;
mod delivery;
mod depths;
mod expiry_check;
mod history;
mod inspector;
mod publisher;
mod queue_monitor;
mod shards;
mod topology;
mod unsettled;

pub(crate) use consumer::Consumer;
pub(crate) use delivery::Delivery;
pub(crate) use inspector::Inspector;
pub(crate) use publisher::Publisher;
pub(crate) use topology::Topology;
