//! Events on RabbitMQ.

mod publisher_task;
mod subscription;
mod topic_exchange;

pub(crate) use publisher_task::{Outgoing, SequenceCounter, count, publish_all};
pub(crate) use subscription::Subscription;
pub(crate) use topic_exchange::TopicExchange;
