//! The exchange, on which events are published and received.

use std::fmt;
use std::sync::Arc;

use tokio::sync::broadcast;

use crate::amqp::Access;
use crate::events::amqp::TopicExchange;
use crate::events::change::Notification;

/// How many notifications an in-process subscriber may lag behind before it misses some.
const LAG_MAX: usize = 1_024;

/// Carries events on RabbitMQ or within this process, or is disabled. Clones are the same exchange.
#[derive(Clone)]
pub struct Exchange(pub(crate) Transport);

/// Sends to all subscribers in this process.
pub(crate) type Sender = broadcast::Sender<Arc<Notification>>;

#[derive(Clone)]
pub(crate) enum Transport {
    Disabled,
    InProcess(Sender),
    Amqp(Arc<TopicExchange>),
}

impl Exchange {
    /// An exchange that drops all events.
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
        Self(Transport::Amqp(Arc::new(TopicExchange::new(access, queue_name))))
    }
}

impl fmt::Debug for Exchange {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Transport::Disabled => formatter.write_str("disabled"),
            Transport::InProcess(_) => formatter.write_str("this process"),
            Transport::Amqp(exchange) => {
                write!(formatter, "{} at {:?}", exchange.name, exchange.access.uri)
            }
        }
    }
}
