//! Events on RabbitMQ.

mod publisher_task;
mod subscription;

use amqp::{ConnectError, Link, RPC_TIMEOUT};
use lapin::options::ExchangeDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Channel, ExchangeKind};
use tokio::time::timeout;

use crate::exchange::TopicExchange;

pub(crate) use publisher_task::{Outbound, Outgoing, SequenceCounter, count, publish_all};
pub(crate) use subscription::Subscription;

/// Why there is no session with the broker. Each variant is named after the step that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("cannot open the channel: {0}")]
    OpenChannel(#[source] lapin::Error),
    #[error("cannot declare exchange {exchange}: {source}")]
    Declare { exchange: String, source: lapin::Error },
    #[error("cannot subscribe: {0}")]
    Subscribe(#[source] lapin::Error),
    #[error("no response from the broker within {RPC_TIMEOUT:?}")]
    Timeout(#[from] tokio::time::error::Elapsed),
}

/// Opens a connection and a channel, and declares the exchange.
async fn open(exchange: &TopicExchange, name: &str) -> Result<(Link, Channel), SessionError> {
    let connection = amqp::connect(&exchange.access, name).await?;
    let channel = timeout(RPC_TIMEOUT, connection.create_channel()).await?;
    let channel = channel.map_err(SessionError::OpenChannel)?;
    declare(exchange, &channel).await?;
    Ok((connection, channel))
}

async fn declare(exchange: &TopicExchange, channel: &Channel) -> Result<(), SessionError> {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let (name, arguments) = (exchange.name.clone(), FieldTable::default());
    let declared = channel.exchange_declare(name, ExchangeKind::Topic, durable, arguments);
    timeout(RPC_TIMEOUT, declared).await?.map_err(|source| {
        let exchange = exchange.name.to_string();
        SessionError::Declare { exchange, source }
    })
}
