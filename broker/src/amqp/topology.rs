//! The queues: the main queue, its delay queues, and its dead-letter queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Connection, ErrorKind};

use tokio::time::timeout;

use super::{Config, depths};
use crate::config::QueueType;
use crate::retry::LEVELS_SECONDS;

// Decision: docs/decisions/0013-why-is-the-delivery-limit-100.md
/// How often the broker redelivers a message whose consumer died, before it makes the message a
/// dead letter. It guards against a message that kills consumers, and is far above the number of
/// restarts during a backlog. RabbitMQ 3.10 has no limit by default; 4.x has 20. -1 would destroy
/// messages on 3.10.
const DELIVERY_LIMIT: i32 = 100;
/// Out of reach: each inspection takes all dead letters and gives them back, which counts as a
/// delivery, and the broker drops letters beyond the limit. Without a value, RabbitMQ 4.x would use
/// 20.
const DEAD_DELIVERY_LIMIT: i32 = 1_000_000;

/// Deadline for finding out which queues have vanished.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The names of the queues. With the default exchange, each name is also the routing key.
#[derive(Clone, Debug)]
pub(super) struct Topology {
    pub(super) queue: ShortString,
    pub(super) dead: ShortString,
    /// One for each level of [`LEVELS_SECONDS`], in the same order.
    pub(super) delays: Vec<ShortString>,
    queue_type: QueueType,
    /// Whether this process has declared the queues before, so that a missing queue has vanished.
    /// All clones share it.
    has_declared: Arc<AtomicBool>,
}

/// Why the queues cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum TopologyError {
    #[error("cannot declare queue {queue}: {source}")]
    Declare { queue: String, source: lapin::Error },
    #[error(
        "queue {queue} exists with other arguments, so it might lose messages ({text}); \
         move its messages and delete it, or set another QUEUE_NAME"
    )]
    OtherArguments { queue: String, text: String },
    #[error("cannot open a channel: {0}")]
    OpenChannel(#[source] lapin::Error),
}

impl Topology {
    pub(super) fn new(config: &Config) -> Self {
        let queue = &config.queue.queue_name;
        Self {
            queue: queue.as_str().into(),
            dead: format!("{queue}.dead").into(),
            delays: LEVELS_SECONDS.iter().map(|s| format!("{queue}.retry.{s}s").into()).collect(),
            queue_type: config.queue.queue_type,
            has_declared: Arc::default(),
        }
    }

    /// Declares every queue, and reports those that have vanished since they were declared before.
    ///
    /// A main queue of the other type is used as it is, with a warning: the queue may be shared
    /// with the Go services, and an error would only cause an outage. Any other difference is an
    /// error, because the queue might drop confirmed messages.
    pub(super) async fn declare(&self, connection: &Connection) -> Result<(), TopologyError> {
        if self.has_declared.load(Ordering::Relaxed) {
            self.report_vanished(connection).await;
        }
        let mut channel = open(connection).await?;
        // The dead-letter queue first: without it, the main queue would drop messages that it gives
        // up.
        let mut queues = vec![(&self.dead, dead_arguments())];
        queues.push((&self.queue, self.main_arguments(self.queue_type)));
        for (delay, seconds) in self.delays.iter().zip(LEVELS_SECONDS) {
            queues.push((delay, self.delay_arguments(seconds)));
        }
        for (queue, arguments) in queues {
            if let Err(source) = declare(&channel, queue, arguments).await {
                // The broker has closed the channel with the error.
                channel = open(connection).await?;
                self.adopt(&channel, queue, source).await?;
            }
        }
        self.has_declared.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Ignores failures, because declaring the queues is more important.
    async fn report_vanished(&self, connection: &Connection) {
        let missing = timeout(INSPECT_TIMEOUT, depths::missing(connection, self)).await;
        for queue in missing.ok().and_then(Result::ok).unwrap_or_default() {
            tracing::error!(
                %queue,
                "a queue has vanished, and all messages in it are lost; declaring it again. It was \
                 deleted, a policy with `expires` matches it, or the broker lost its files"
            );
        }
    }

    // Decision: docs/decisions/0014-which-existing-queues-does-a-service-use.md
    async fn adopt(
        &self,
        channel: &Channel,
        queue: &ShortString,
        refusal: lapin::Error,
    ) -> Result<(), TopologyError> {
        let text = match refusal.kind() {
            ErrorKind::ProtocolError(error)
                if *error.kind() == AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED) =>
            {
                error.get_message().to_string()
            }
            _ => return Err(TopologyError::Declare { queue: queue.to_string(), source: refusal }),
        };
        let other_type = match self.queue_type {
            QueueType::Quorum => QueueType::Classic,
            QueueType::Classic => QueueType::Quorum,
        };
        let arguments = self.main_arguments(other_type);
        // The broker names only one difference. Only a declaration shows that there is no other.
        if *queue != self.queue || declare(channel, queue, arguments).await.is_err() {
            return Err(TopologyError::OtherArguments { queue: queue.to_string(), text });
        }
        tracing::warn!(%queue, difference = text, "the queue has another type; using it as it is");
        Ok(())
    }

    /// The Go services declare a durable queue without arguments. RabbitMQ treats that and
    /// `x-queue-type: classic` as the same. Without the type, a virtual host whose default type is
    /// quorum would create or accept a quorum queue without a dead-letter exchange.
    fn main_arguments(&self, queue_type: QueueType) -> FieldTable {
        match queue_type {
            QueueType::Classic => typed("classic"),
            QueueType::Quorum => {
                let mut arguments = dead_lettering_to(&self.dead);
                insert(&mut arguments, "x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT));
                arguments
            }
        }
    }

    /// Delay queues are always quorum queues: a delayed message must survive a restart of the
    /// broker, and only quorum queues move it back with confirms (`at-least-once`).
    fn delay_arguments(&self, seconds: u64) -> FieldTable {
        let milliseconds = i64::try_from(seconds * 1_000).unwrap_or(i64::MAX);
        let mut arguments = dead_lettering_to(&self.queue);
        insert(&mut arguments, "x-message-ttl", AMQPValue::LongLongInt(milliseconds));
        arguments
    }
}

fn dead_arguments() -> FieldTable {
    let mut arguments = typed("quorum");
    insert(&mut arguments, "x-delivery-limit", AMQPValue::LongInt(DEAD_DELIVERY_LIMIT));
    arguments
}

fn typed(queue_type: &str) -> FieldTable {
    let mut arguments = FieldTable::default();
    insert(&mut arguments, "x-queue-type", text(queue_type));
    arguments
}

fn dead_lettering_to(queue: &ShortString) -> FieldTable {
    let mut arguments = typed("quorum");
    insert(&mut arguments, "x-dead-letter-exchange", text(""));
    insert(&mut arguments, "x-dead-letter-routing-key", text(queue.as_str()));
    insert(&mut arguments, "x-dead-letter-strategy", text("at-least-once"));
    // Required by at-least-once dead-lettering. It has no effect, because there is no length limit.
    insert(&mut arguments, "x-overflow", text("reject-publish"));
    arguments
}

fn insert(table: &mut FieldTable, key: &str, value: AMQPValue) {
    table.insert(key.into(), value);
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

async fn declare(
    channel: &Channel,
    queue: &ShortString,
    arguments: FieldTable,
) -> lapin::Result<()> {
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.clone(), durable, arguments).await.map(drop)
}

async fn open(connection: &Connection) -> Result<Channel, TopologyError> {
    connection.create_channel().await.map_err(TopologyError::OpenChannel)
}
