//! The queues: the main queue, its shards, its delay queues, and its dead-letter queue.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

use lapin::options::QueueDeclareOptions;
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, ErrorKind};
use tokio::time::timeout;

use super::depths::{self, QueueCounts};
use super::shards::shard_of;
use crate::amqp::{Connection, RPC_TIMEOUT, SessionError, within_deadline};
use crate::queue::config::{QueueConfig, QueueType, SHARDS_MAX};
use crate::queue::gauges::Depths;
use crate::queue::message;
use crate::queue::retry::LEVELS_SECONDS;

// Decision: docs/decisions/0013-why-is-the-delivery-limit-100.md
/// How often the broker redelivers a message whose consumer died, before it makes the message a
/// dead letter. The limit stops a message that kills consumers, and is far above the number of
/// consumer restarts during a backlog. RabbitMQ 3.10 has no limit by default; 4.x has 20. The value
/// -1 would destroy messages on 3.10.
const DELIVERY_LIMIT: i32 = 100;
/// The delivery limit of the dead-letter queue, too high to be reached. Each inspection takes all
/// dead letters and gives them back, which counts as a delivery, and the broker drops a letter
/// beyond the limit. The default of RabbitMQ 4.x is 20.
const DEAD_DELIVERY_LIMIT: i32 = 1_000_000;

/// How long a shard waits for a consumer whose RabbitMQ node is lost, before it delivers to another
/// one. RabbitMQ 4.3 waits for 60 s by default, and delivers nothing meanwhile. Older versions
/// ignore the argument and do not wait.
const DISCONNECTED_TIMEOUT_MILLISECONDS: i32 = 1_000;
/// Time for the declaration of one shard. In a cluster, all nodes take part in it.
const DECLARE_SHARD_TIMEOUT: Duration = Duration::from_millis(200);
/// Time in which another consumer takes over a shard.
const TAKEOVER: Duration = Duration::from_secs(1);
/// Deadline for finding out which queues have vanished.
const INSPECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The names of the queues. With the default exchange, each name is also the routing key.
#[derive(Clone, Debug)]
pub(crate) struct Topology {
    /// The main queue, which is that of the contract. With shards, it contains only messages that
    /// others have published to it, and those that return from the delay queues.
    pub(super) queue: ShortString,
    /// The queues with the messages about the objects of each shard. Empty if there is one shard,
    /// because its queue is the main queue.
    pub(super) shards: Vec<ShortString>,
    pub(super) dead: ShortString,
    /// One for each level of [`LEVELS_SECONDS`], in the same order.
    pub(super) delays: Vec<ShortString>,
    queue_type: QueueType,
    /// Whether this process has declared the queues. A queue that is missing after that has
    /// vanished. All clones share this flag.
    has_declared: Arc<AtomicBool>,
    /// Whether there are consumers, but a shard has none. All clones share this flag.
    a_shard_is_unread: Arc<AtomicBool>,
    /// The highest number of shards that this process has seen. All clones share it.
    shards_seen: Arc<AtomicU16>,
}

/// The result of [`Topology::inspect`].
pub(super) struct QueueState {
    pub(super) depths: Depths,
    /// The ready messages of the main queue alone.
    pub(super) ready_in_main: u64,
    /// Whether the main queue or a shard has ready messages, but no consumer.
    pub(super) lacks_consumer: bool,
    /// The queues that do not exist.
    pub(super) missing: Vec<ShortString>,
}

impl Topology {
    pub(crate) fn new(config: &QueueConfig) -> Self {
        let queue = &config.queue_name;
        Self {
            queue: queue.as_str().into(),
            shards: (0..config.shards)
                .filter(|_| config.shards > 1)
                .map(|shard| shard_name(queue, shard))
                .collect(),
            dead: format!("{queue}.dead").into(),
            delays: LEVELS_SECONDS.iter().map(|s| format!("{queue}.retry.{s}s").into()).collect(),
            queue_type: config.queue_type,
            has_declared: Arc::default(),
            a_shard_is_unread: Arc::default(),
            shards_seen: Arc::default(),
        }
    }

    /// The queue for messages about this object. While a shard has no consumer, it is the main
    /// queue, see [`Self::check_shards`].
    pub(super) fn queue_of(&self, id: i64) -> &ShortString {
        if self.a_shard_is_unread.load(Ordering::Relaxed) {
            return &self.queue;
        }
        self.shards.get(usize::from(shard_of(id, self.shard_count()))).unwrap_or(&self.queue)
    }

    /// The number of shards; 0 if there are none besides the main queue.
    fn shard_count(&self) -> u16 {
        u16::try_from(self.shards.len()).unwrap_or(SHARDS_MAX)
    }

    /// The queue for a message with this body. A body without an id belongs to the main queue.
    pub(super) fn queue_of_body(&self, body: &[u8]) -> &ShortString {
        message::decode(body).map_or(&self.queue, |id| self.queue_of(id))
    }

    /// Whether this is the main queue or a shard, even one beyond [`Self::shards`].
    pub(super) fn is_work_queue(&self, queue: &str) -> bool {
        let suffix = queue.strip_prefix(self.queue.as_str());
        suffix.is_some_and(|suffix| {
            let number = suffix.strip_prefix('.').map(str::parse::<u16>);
            suffix.is_empty() || number.is_some_and(|number| number.is_ok())
        })
    }

    // Decision: docs/decisions/0079-how-does-the-number-of-shards-change.md
    /// The queues of shards that exist beyond [`Self::shards`], because the number of shards was
    /// larger before, or already is at another process.
    ///
    /// The first number without a queue ends the search, unless this process has seen a higher one.
    pub(super) async fn further_shards(
        &self,
        connection: &Connection,
    ) -> lapin::Result<Vec<ShortString>> {
        let (mut channel, mut further) = (None, Vec::new());
        for shard in self.shard_count()..SHARDS_MAX {
            let queue = shard_name(&self.queue, shard);
            let is_shard = match depths::counts_on(&mut channel, connection, &queue).await {
                Ok(Some(_)) => self.is_shard(connection, &queue).await.map(Some),
                Ok(None) => Ok(None),
                Err(error) => Err(error),
            };
            match is_shard {
                Ok(Some(true)) => {
                    self.shards_seen.fetch_max(shard + 1, Ordering::Relaxed);
                    further.push(queue);
                }
                // It belongs to another application.
                Ok(Some(false)) => {}
                Ok(None) if shard < self.shards_seen.load(Ordering::Relaxed) => {}
                Ok(None) => break,
                Err(error) if has_code(&error, AMQPSoftError::ACCESSREFUSED) => {
                    tracing::warn!(
                        %queue,
                        "the RabbitMQ user may not read shards; if there are any, run \
                         scripts/rabbitmq-user again"
                    );
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(further)
    }

    /// Whether an existing queue has the arguments of a shard. Warns if it does not.
    async fn is_shard(&self, connection: &Connection, queue: &ShortString) -> lapin::Result<bool> {
        let channel = connection.create_channel().await?;
        match declare(&channel, queue, self.shard_arguments()).await {
            Ok(()) => channel.close(200, "done".into()).await.and(Ok(true)),
            Err(error) if has_code(&error, AMQPSoftError::PRECONDITIONFAILED) => {
                tracing::warn!(
                    %queue,
                    %error,
                    "the queue has the name of a shard, but is none; not consuming from it"
                );
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    // Decision: docs/decisions/0079-how-does-the-number-of-shards-change.md
    /// Checks whether all shards have a consumer.
    ///
    /// A consumer looks for shards when its session starts. If it is older than the shards, it does
    /// not read them, so a producer publishes to the main queue meanwhile, which every consumer
    /// reads.
    pub(super) async fn check_shards(&self, connection: &Connection) {
        // The broker does not respond on a connection that it has blocked.
        if self.shards.is_empty() || connection.status().blocked() {
            return;
        }
        // A slow leader of a quorum queue counts as one without consumers, as does a shard that
        // another consumer takes over at this moment. So ask twice.
        let checking = async {
            if !self.has_unread_shard(connection).await? {
                return Ok::<bool, lapin::Error>(false);
            }
            tokio::time::sleep(TAKEOVER).await;
            self.has_unread_shard(connection).await
        };
        match within_deadline(checking).await {
            Ok(is_unread) => self.set_unread(is_unread),
            Err(error) => tracing::debug!(error, "cannot check the consumers of the shards"),
        }
    }

    async fn has_unread_shard(&self, connection: &Connection) -> lapin::Result<bool> {
        let mut channel = None;
        let mut has_consumer = async |queue: &ShortString| {
            let counts = depths::counts_on(&mut channel, connection, queue).await?;
            Ok::<bool, lapin::Error>(counts.unwrap_or_default().consumers > 0)
        };
        // Consumers that start later find the shards.
        if !has_consumer(&self.queue).await? {
            return Ok(false);
        }
        for shard in &self.shards {
            if !has_consumer(shard).await? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn set_unread(&self, is_unread: bool) {
        let (was_unread, main_queue) =
            (self.a_shard_is_unread.swap(is_unread, Ordering::Relaxed), &self.queue);
        match (was_unread, is_unread) {
            (false, true) => tracing::warn!(
                shards = self.shard_count(),
                %main_queue,
                "no consumer reads some of the shards; publishing to the main queue until all are \
                 read. Restart the consumers with the same SHARDS"
            ),
            (true, false) => tracing::info!(
                shards = self.shard_count(),
                "consumers read all shards; publishing to them"
            ),
            _ => {}
        }
    }

    /// Declares every queue, and logs each queue that has vanished since this process declared it.
    ///
    /// A main queue of the other type is used as it is, with a warning: the queue may be shared
    /// with the Go services, and an error would only cause an outage. Any other difference is an
    /// error, because the queue might drop confirmed messages.
    pub(super) async fn declare(&self, connection: &Connection) -> Result<(), SessionError> {
        let limit = RPC_TIMEOUT + DECLARE_SHARD_TIMEOUT * u32::from(self.shard_count());
        timeout(limit, self.declare_all(connection)).await?
    }

    async fn declare_all(&self, connection: &Connection) -> Result<(), SessionError> {
        if self.has_declared.load(Ordering::Relaxed) {
            self.report_vanished(connection).await;
        }
        let mut channel = open(connection).await?;
        // Declare the dead-letter queue first: without it, the main queue would drop the messages
        // that it gives up.
        let mut queues = vec![(&self.dead, dead_arguments())];
        queues.push((&self.queue, self.main_arguments(self.queue_type)));
        for shard in &self.shards {
            queues.push((shard, self.shard_arguments()));
        }
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

    /// Counts the messages in all queues, one queue after the other. A message that moves meanwhile
    /// may be counted twice or not at all. `further` are the shards of [`Self::further_shards`].
    pub(super) async fn inspect(
        &self,
        connection: &Connection,
        further: &[ShortString],
    ) -> lapin::Result<QueueState> {
        let (mut channel, mut missing) = (None, Vec::new());
        let mut counts = async |queue: &ShortString| {
            let counts = depths::counts_on(&mut channel, connection, queue).await?;
            if counts.is_none() {
                missing.push(queue.clone());
            }
            Ok::<QueueCounts, lapin::Error>(counts.unwrap_or_default())
        };
        let mut delayed = 0;
        for delay in &self.delays {
            delayed += counts(delay).await?.ready;
        }
        let main = counts(&self.queue).await?;
        let (mut ready, mut lacks_consumer) = (main.ready, main.lacks_consumer());
        for shard in self.shards.iter().chain(further) {
            let shard = counts(shard).await?;
            ready += shard.ready;
            lacks_consumer |= shard.lacks_consumer();
        }
        let dead = counts(&self.dead).await?.ready;
        let depths = Depths { ready, delayed, dead };
        Ok(QueueState { depths, ready_in_main: main.ready, lacks_consumer, missing })
    }

    /// Logs each queue that has vanished. Ignores failures, because declaring the queues is more
    /// important.
    async fn report_vanished(&self, connection: &Connection) {
        let Ok(Ok(state)) = timeout(INSPECT_TIMEOUT, self.inspect(connection, &[])).await else {
            return;
        };
        for queue in state.missing {
            tracing::error!(
                %queue,
                "a queue has vanished, and all messages in it are lost; declaring it again. It was \
                 deleted, a policy with `expires` matches it, or the broker lost its files"
            );
        }
    }

    // Decision: docs/decisions/0014-which-existing-queues-does-a-service-use.md
    /// Accepts an existing main queue of the other type. Fails if the broker refused the
    /// declaration for any other reason.
    async fn adopt(
        &self,
        channel: &Channel,
        queue: &ShortString,
        refusal: lapin::Error,
    ) -> Result<(), SessionError> {
        let text = match refusal.kind() {
            ErrorKind::ProtocolError(error)
                if has_code(&refusal, AMQPSoftError::PRECONDITIONFAILED) =>
            {
                error.get_message().to_string()
            }
            _ => {
                return Err(SessionError::Declare {
                    object: format!("queue {queue}"),
                    source: refusal,
                });
            }
        };
        let other_type = match self.queue_type {
            QueueType::Quorum => QueueType::Classic,
            QueueType::Classic => QueueType::Quorum,
        };
        let arguments = self.main_arguments(other_type);
        // The broker's refusal names only one difference. A declaration with the other type shows
        // whether there are more.
        if *queue != self.queue || declare(channel, queue, arguments).await.is_err() {
            return Err(SessionError::OtherArguments { queue: queue.to_string(), text });
        }
        tracing::warn!(%queue, difference = text, "the queue has another type; using it as it is");
        Ok(())
    }

    /// The Go services declare a durable queue without arguments. To RabbitMQ, that is the same as
    /// `x-queue-type: classic`. This declaration names the type nevertheless: without it, a virtual
    /// host whose default type is quorum would create or accept a quorum queue without a
    /// dead-letter exchange.
    fn main_arguments(&self, queue_type: QueueType) -> FieldTable {
        match queue_type {
            QueueType::Classic => typed("classic"),
            QueueType::Quorum => self.work_queue_arguments(),
        }
    }

    fn work_queue_arguments(&self) -> FieldTable {
        let mut arguments = dead_lettering_to(&self.dead);
        insert(&mut arguments, "x-delivery-limit", AMQPValue::LongInt(DELIVERY_LIMIT));
        arguments
    }

    /// Shards are always quorum queues, whose leaders RabbitMQ distributes over the nodes. It
    /// delivers the messages of a shard to one consumer at a time, so that the lookups of an object
    /// coalesce there.
    fn shard_arguments(&self) -> FieldTable {
        let mut arguments = self.work_queue_arguments();
        insert(&mut arguments, "x-single-active-consumer", AMQPValue::Boolean(true));
        insert(&mut arguments, "x-queue-leader-locator", text("balanced"));
        let timeout = AMQPValue::LongInt(DISCONNECTED_TIMEOUT_MILLISECONDS);
        insert(&mut arguments, "x-consumer-disconnected-timeout", timeout);
        arguments
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

fn has_code(error: &lapin::Error, code: AMQPSoftError) -> bool {
    matches!(error.kind(), ErrorKind::ProtocolError(error) if *error.kind() == AMQPErrorKind::Soft(code))
}

fn shard_name(queue: impl fmt::Display, shard: u16) -> ShortString {
    format!("{queue}.{shard}").into()
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

async fn open(connection: &Connection) -> Result<Channel, SessionError> {
    connection.create_channel().await.map_err(SessionError::OpenChannel)
}
