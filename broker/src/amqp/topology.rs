//! The queues: the one of the contract, its delay queues, and its dead letters.

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
/// How often the broker may redeliver a message whose consumer died with it before it becomes a
/// dead letter. It guards against a message that kills consumers. RabbitMQ 3.10 has no limit by
/// default, 4.x has 20 and drops without a dead-letter exchange; this is far above what restarts
/// during a backlog add up to, and -1 would destroy messages on 3.10.
const DELIVERY_LIMIT: i32 = 100;
/// Each look at the dead letters takes them all and gives them back, which counts as a delivery; the
/// broker drops what is beyond the limit. So it is out of reach, and set at all because of the default
/// of 20 that 4.x has.
const DEAD_DELIVERY_LIMIT: i32 = 1_000_000;

/// How long a session may take to find out which queues have vanished.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The names of the queues, each on the default exchange, so each is its own routing key.
#[derive(Clone, Debug)]
pub(super) struct Topology {
    pub(super) queue: ShortString,
    pub(super) dead: ShortString,
    /// One for each level of [`LEVELS_SECONDS`], in the same order.
    pub(super) delays: Vec<ShortString>,
    queue_type: QueueType,
    /// Whether this process has declared them before, so that a queue that is missing has vanished. Shared by
    /// all clones.
    declared: Arc<AtomicBool>,
}

/// Why the queues are not as they have to be.
#[derive(Debug, thiserror::Error)]
pub(super) enum TopologyError {
    #[error("queue {queue}: {source}")]
    Declare { queue: String, source: lapin::Error },
    #[error(
        "queue {queue} exists with other arguments, by which it might lose messages ({text}); \
         move it away or set another QUEUE_NAME"
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
            declared: Arc::default(),
        }
    }

    /// Declares every queue, and reports those that have vanished since they were declared before.
    ///
    /// A main queue of the other type is used as it is, with a warning: that is how it looks while
    /// we share it with the Go services, and refusing would only add an outage. Any other
    /// difference is an error, for it could mean that the queue drops what it has confirmed.
    pub(super) async fn declare(&self, connection: &Connection) -> Result<(), TopologyError> {
        if self.declared.load(Ordering::Relaxed) {
            self.report_vanished(connection).await;
        }
        let mut channel = open(connection).await?;
        // The dead letters first: the main queue must never be able to give up a message to nowhere.
        let mut queues = vec![(&self.dead, dead_arguments())];
        queues.push((&self.queue, self.main_arguments(self.queue_type)));
        for (delay, seconds) in self.delays.iter().zip(LEVELS_SECONDS) {
            queues.push((delay, self.delay_arguments(seconds)));
        }
        for (queue, arguments) in queues {
            if let Err(source) = declare(&channel, queue, arguments).await {
                // The broker has closed the channel along with the refusal.
                channel = open(connection).await?;
                self.adopt(&channel, queue, source).await?;
            }
        }
        self.declared.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// If that cannot be found out, declaring them is more important.
    async fn report_vanished(&self, connection: &Connection) {
        let missing = timeout(INSPECT_TIMEOUT, depths::missing(connection, self)).await;
        for queue in missing.ok().and_then(Result::ok).unwrap_or_default() {
            tracing::error!(
                %queue,
                "a queue has vanished, and all messages in it are lost; declaring it again. Someone deleted \
                 it, a policy with `expires` matches it, or the broker lost its files"
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
        // The broker names one difference only; that there is no other, only a declaration tells.
        if *queue != self.queue || declare(channel, queue, arguments).await.is_err() {
            return Err(TopologyError::OtherArguments { queue: queue.to_string(), text });
        }
        tracing::warn!(%queue, difference = text, "the queue has another type; using it as it is");
        Ok(())
    }

    /// Classic is equivalent to what the Go services declare, durable and without arguments: RabbitMQ treats
    /// `x-queue-type: classic` and no type as the same. Without the type, a virtual host whose default type is
    /// quorum would create a quorum queue, or accept one, that has no dead-letter exchange.
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

    /// Delay queues are always quorum: a message must survive the broker while it waits, and the
    /// move back must be confirmed (`at-least-once`), which classic queues do not offer.
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
    // At-least-once dead lettering is only offered together with it. There is no length limit.
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
