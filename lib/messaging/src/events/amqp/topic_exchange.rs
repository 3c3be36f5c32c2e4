//! The exchange that carries the events.

use lapin::options::ExchangeDeclareOptions;
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, ExchangeKind};

use crate::amqp::{Access, Connection, SessionError};

/// A topic exchange on RabbitMQ.
pub(crate) struct TopicExchange {
    pub(crate) access: Access,
    pub(crate) name: ShortString,
}

impl TopicExchange {
    /// The exchange that belongs to a queue.
    pub(crate) fn new(access: Access, queue_name: &str) -> Self {
        Self { access, name: format!("{queue_name}.events").into() }
    }

    /// Opens a channel and declares the exchange.
    pub(super) async fn open(&self, connection: &Connection) -> Result<Channel, SessionError> {
        let channel = connection.create_channel().await.map_err(SessionError::OpenChannel)?;
        self.declare(&channel).await?;
        Ok(channel)
    }

    pub(super) async fn declare(&self, channel: &Channel) -> Result<(), SessionError> {
        let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
        let (name, arguments) = (self.name.clone(), FieldTable::default());
        let declared = channel.exchange_declare(name, ExchangeKind::Topic, durable, arguments);
        declared.await.map_err(|source| SessionError::Declare {
            object: format!("exchange {}", self.name),
            source,
        })
    }
}
