//! A private queue on a shared broker.

use std::time::Duration;

use lapin::message::BasicGetMessage;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, ExchangeDeleteOptions,
    QueueDeleteOptions,
};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ErrorKind};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::{amqp, amqp_uri, async_drop, wait_for};

/// The delays of the retry queues beside a queue: `<name>.retry.2s` and so on.
pub const RETRY_LEVELS: [&str; 6] = ["2s", "4s", "8s", "16s", "32s", "60s"];

/// The most shards that a test has.
const SHARDS_MAX: u16 = 32;
const PERSISTENT: u8 = 2;
const NOT_FOUND: u16 = 404;
const DEADLINE: Duration = Duration::from_secs(10);

/// A unique queue name, and access to the messages in the queues of that name.
///
/// This type declares nothing, because the code under test declares the queues. On drop, the queue,
/// its shards, its `.dead`, its `.retry.*` and the exchange `.events` are deleted if they exist. The connection
/// is opened at its first use.
#[derive(Debug)]
pub struct Queue {
    /// The value for `QUEUE_NAME`.
    pub name: String,
    uri: String,
    connection: Mutex<Option<Connection>>,
}

impl Queue {
    /// A new queue name on the shared broker.
    pub fn new() -> Self {
        Self::on(&amqp_uri())
    }

    /// A new queue name on the broker at `uri`.
    pub fn on(uri: &str) -> Self {
        let name = format!("lastseen-test-{}", Uuid::now_v7().simple());
        Self { name, uri: uri.to_owned(), connection: Mutex::new(None) }
    }

    /// The URI of the broker.
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// The name of the dead-letter queue.
    pub fn dead(&self) -> String {
        format!("{}.dead", self.name)
    }

    /// The number of ready messages in queue `name`, which excludes unacked ones; `None` if there
    /// is no such queue.
    pub async fn depth(&self, name: &str) -> Option<u32> {
        let channel = self.channel().await;
        match within_deadline("queue.declare", amqp::ready_messages(&channel, name)).await {
            Ok(count) => Some(count),
            Err(error) if is_not_found(&error) => None,
            Err(error) => panic!("cannot inspect queue {name}: {error}"),
        }
    }

    /// Removes the first ready message from queue `name`; `None` if there is none.
    pub async fn get(&self, name: &str) -> Option<BasicGetMessage> {
        wait_for("the queue has started", async || started(self.try_get(name).await)).await
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

    /// Removes all ready messages from queue `name`, which may be missing, and returns them.
    pub async fn take_all(&self, name: &str) -> Vec<BasicGetMessage> {
        let mut messages = Vec::new();
        if self.depth(name).await.is_none() {
            return messages;
        }
        wait_for("the queue has started", async || {
            let channel = self.channel().await;
            loop {
                let got = channel.basic_get(name.into(), BasicGetOptions { no_ack: true });
                match started(within_deadline("basic.get", got).await)? {
                    Some(message) => messages.push(message),
                    None => return Some(()),
                }
            }
        })
        .await;
        messages
    }

    /// Deletes the queue and its messages.
    pub async fn delete(&self) {
        let channel = self.channel().await;
        let deleted =
            channel.queue_delete(self.name.as_str().into(), QueueDeleteOptions::default());
        within_deadline("queue.delete", deleted).await.expect("a queue can be deleted");
    }

    /// Publishes a persistent message with any body to the queue, and waits for the publisher
    /// confirm. Tries again if the broker nacks the message, as a cluster does while it elects a
    /// leader.
    pub async fn publish_raw(&self, body: &[u8]) {
        wait_for("the broker accepts a message", async || {
            // A new channel, because the broker may nack all messages on a channel that has
            // published to a former leader.
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

/// `None` if the process of the queue does not run yet, although the queue is declared. RabbitMQ
/// then closes the connection.
fn started<T>(got: lapin::Result<T>) -> Option<T> {
    match got {
        Ok(got) => Some(got),
        Err(error) if error.to_string().contains("noproc") => None,
        Err(error) => panic!("cannot get from the queue: {error}"),
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
            let connection = amqp::connect(&uri).await?;
            let deleted = async {
                let channel = connection.create_channel().await?;
                let retries = RETRY_LEVELS.iter().map(|level| format!("{name}.retry.{level}"));
                let shards = (0..SHARDS_MAX).map(|shard| format!("{name}.{shard}"));
                let others = [format!("{name}.dead"), name.clone()];
                for queue in retries.chain(shards).chain(others) {
                    // The broker also confirms the deletion of a missing queue.
                    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
                }
                let exchange = format!("{name}.events").into();
                channel.exchange_delete(exchange, ExchangeDeleteOptions::default()).await
            };
            deleted.await.map_err(|error| error.to_string())
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
