//! Events on a RabbitMQ.

mod publisher_task;
mod subscription;

use amqp::{ConnectError, Link, RPC_TIMEOUT};
use lapin::options::ExchangeDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Channel, ExchangeKind};
use tokio::time::timeout;

use crate::exchange::Rabbit;

pub(crate) use publisher_task::{Numbers, Outbound, Outgoing, count, send};
pub(crate) use subscription::Subscription;

/// Why events cannot be told or heard, named after the step that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("cannot open the channel: {0}")]
    OpenChannel(#[source] lapin::Error),
    #[error("exchange {exchange}: {source}")]
    Declare { exchange: String, source: lapin::Error },
    #[error("cannot subscribe: {0}")]
    Subscribe(#[source] lapin::Error),
    #[error("no answer within {RPC_TIMEOUT:?}")]
    Timeout(#[from] tokio::time::error::Elapsed),
}

/// Opens a connection and a channel, and sees to it that the exchange is there.
async fn open(rabbit: &Rabbit, name: &str) -> Result<(Link, Channel), SessionError> {
    let connection = amqp::connect(&rabbit.access, name).await?;
    let channel = timeout(RPC_TIMEOUT, connection.create_channel()).await?;
    let channel = channel.map_err(SessionError::OpenChannel)?;
    declare(rabbit, &channel).await?;
    Ok((connection, channel))
}

async fn declare(rabbit: &Rabbit, channel: &Channel) -> Result<(), SessionError> {
    let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let (name, arguments) = (rabbit.name.clone(), FieldTable::default());
    let declared = channel.exchange_declare(name, ExchangeKind::Topic, durable, arguments);
    timeout(RPC_TIMEOUT, declared).await?.map_err(|source| {
        let exchange = rabbit.name.to_string();
        SessionError::Declare { exchange, source }
    })
}
