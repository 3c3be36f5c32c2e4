//! The exchange, on which events are published and received.

use std::fmt;
use std::sync::Arc;

use amqp::Access;
use lapin::types::ShortString;
use tokio::sync::broadcast;

use crate::Notification;

/// How many notifications an in-process subscriber may lag behind before it misses some.
const LAG_MAX: usize = 1_024;

/// Carries events on RabbitMQ or within this process, or is disabled. Clones are the same exchange.
#[derive(Clone)]
pub struct Exchange(pub(crate) Transport);

/// Shared by all subscribers of this process.
pub(crate) type Sender = broadcast::Sender<Arc<Notification>>;

#[derive(Clone)]
pub(crate) enum Transport {
    Disabled,
    InProcess(Sender),
    Rabbit(Arc<TopicExchange>),
}

/// A topic exchange on RabbitMQ.
pub(crate) struct TopicExchange {
    pub(crate) access: Access,
    pub(crate) name: ShortString,
}

impl Exchange {
    /// Drops all events.
    #[must_use]
    pub fn disabled() -> Self {
        Self(Transport::Disabled)
    }

    /// Creates an exchange within this process.
    #[must_use]
    pub fn in_process() -> Self {
        Self(Transport::InProcess(broadcast::Sender::new(LAG_MAX)))
    }

    /// The durable topic exchange that belongs to a queue on RabbitMQ.
    #[must_use]
    pub fn on_rabbitmq(access: Access, queue_name: &str) -> Self {
        let name = format!("{queue_name}.events").into();
        Self(Transport::Rabbit(Arc::new(TopicExchange { access, name })))
    }

    /// Whether all events are dropped.
    #[must_use]
    pub fn is_disabled(&self) -> bool {
        matches!(self.0, Transport::Disabled)
    }
}

impl fmt::Debug for Exchange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Transport::Disabled => formatter.write_str("disabled"),
            Transport::InProcess(_) => formatter.write_str("this process"),
            Transport::Rabbit(exchange) => {
                write!(formatter, "{} at {:?}", exchange.name, exchange.access.uri)
            }
        }
    }
}
