//! A private queue on a shared broker.

use std::time::Duration;

use lapin::message::BasicGetMessage;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Confirmation, Connection, ErrorKind};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::{amqp, amqp_uri, async_drop, eventually};

/// The delays of the retry queues beside a queue: `<name>.retry.2s` and so on.
pub const RETRY_LEVELS: [&str; 6] = ["2s", "4s", "8s", "16s", "32s", "60s"];

const PERSISTENT: u8 = 2;
const NOT_FOUND: u16 = 404;
const DEADLINE: Duration = Duration::from_secs(10);

/// A unique queue name, and access to the messages in the queues of that name.
///
/// It declares nothing, because the code under test does. On drop, the queue, its `.dead`, its
/// `.retry.*` and the exchange `.events` are deleted if they exist. The connection is opened at its
/// first use.
#[derive(Debug)]
pub struct Queue {
    /// The value for `QUEUE_NAME`.
    pub name: String,
    uri: String,
    connection: Mutex<Option<Connection>>,
}

impl Queue {
    /// A name on the shared broker.
    #[must_use]
    pub fn new() -> Self {
        Self::on(&amqp_uri())
    }

    /// A name on the broker at `uri`.
    #[must_use]
    pub fn on(uri: &str) -> Self {
        let name = format!("lastseen-test-{}", Uuid::now_v7().simple());
        Self { name, uri: uri.to_owned(), connection: Mutex::new(None) }
    }

    /// The name of the dead-letter queue.
    #[must_use]
    pub fn dead(&self) -> String {
        format!("{}.dead", self.name)
    }

    /// The number of ready messages in queue `name`, which excludes unacked ones; `None` if there
    /// is no such queue.
    pub async fn depth(&self, name: &str) -> Option<u32> {
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let channel = self.channel().await;
        let declared = channel.queue_declare(name.into(), passive, FieldTable::default());
        match within_deadline("queue.declare", declared).await {
            Ok(queue) => Some(queue.message_count()),
            Err(error) if is_not_found(&error) => None,
            Err(error) => panic!("cannot inspect queue {name}: {error}"),
        }
    }

    /// Removes the first ready message from queue `name`; `None` if there is none.
    ///
    /// # Panics
    /// When the broker does not answer the request.
    pub async fn get(&self, name: &str) -> Option<BasicGetMessage> {
        let got = self.try_get(name).await;
        got.unwrap_or_else(|error| panic!("cannot get from queue {name}: {error}"))
    }

    /// Like [`Queue::get`].
    ///
    /// # Errors
    /// When the broker rejects the request, such as while a cluster elects a leader.
    pub async fn try_get(&self, name: &str) -> lapin::Result<Option<BasicGetMessage>> {
        let channel = self.channel().await;
        let got = channel.basic_get(name.into(), BasicGetOptions { no_ack: true });
        within_deadline("basic.get", got).await
    }

    /// Publishes a persistent message with any body to the queue, and waits for the publisher
    /// confirm. Tries again if the broker nacks it, as a cluster does while it elects a leader.
    ///
    /// # Panics
    /// When the queue does not exist, or the broker does not accept the message.
    pub async fn publish_raw(&self, body: &[u8]) {
        eventually("the broker accepts a message", DEADLINE, async || {
            // A new channel: one that has published to a former leader may always be nacked.
            let channel = self.channel().await;
            let confirms = channel.confirm_select(ConfirmSelectOptions::default()).await;
            confirms.expect("the broker should confirm");
            let mandatory = BasicPublishOptions { mandatory: true, ..Default::default() };
            let persistent = BasicProperties::default().with_delivery_mode(PERSISTENT);
            let name = self.name.as_str().into();
            let published = channel.basic_publish("".into(), name, mandatory, body, persistent);
            let confirmation = published.await.expect("the broker should be reachable").await;
            match confirmation.expect("the broker should confirm") {
                Confirmation::Ack(None) => Some(()),
                Confirmation::Nack(_) => None,
                returned => panic!("queue {} does not exist: {returned:?}", self.name),
            }
        })
        .await;
    }

    /// Opens a new channel, because any error, even an expected one, closes its channel.
    async fn channel(&self) -> Channel {
        let mut slot = self.connection.lock().await;
        let connection = match slot.take() {
            Some(connection) if connection.status().connected() => connection,
            _ => {
                amqp::connect(&self.uri).await.expect("the test's broker should accept connections")
            }
        };
        let channel = slot.insert(connection).create_channel();
        within_deadline("channel.open", channel).await.expect("a channel should open")
    }
}

impl Default for Queue {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let (uri, name) = (self.uri.clone(), self.name.clone());
        async_drop::block_on("delete a test's queues", async move || {
            let channel = async {
                let connection = amqp::connect(&uri).await?;
                let channel = connection.create_channel().await;
                channel.map(|channel| (connection, channel)).map_err(|error| error.to_string())
            };
            let (_connection, channel) = channel.await?;
            let retries = RETRY_LEVELS.iter().map(|level| format!("{name}.retry.{level}"));
            for queue in retries.chain([format!("{name}.dead"), name.clone()]) {
                // The broker also confirms the deletion of a missing queue.
                let deleted = channel.queue_delete(queue.into(), QueueDeleteOptions::default());
                deleted.await.map_err(|error| error.to_string())?;
            }
            let exchange = format!("{name}.events").into();
            let deleted = channel.exchange_delete(exchange, ExchangeDeleteOptions::default());
            deleted.await.map_err(|error| error.to_string())?;
            Ok(())
        });
    }
}

async fn within_deadline<T>(what: &str, work: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(DEADLINE, work).await;
    done.unwrap_or_else(|_| panic!("the broker did not answer {what} within {DEADLINE:?}"))
}

fn is_not_found(error: &lapin::Error) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error) if error.get_id() == NOT_FOUND)
}
