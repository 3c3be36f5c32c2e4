//! Receives deliveries from RabbitMQ.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::try_join_all;
use futures_util::stream::{Peekable, once};
use futures_util::{Stream, StreamExt as _};
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Acker, Channel, message};
use tokio::sync::watch;
use tokio::time::timeout;

use super::ack_batcher::AckBatcher;
use super::delivery::{Delivery, REQUEUE, SettlementContext};
use super::depths;
use super::publisher::Publisher;
use super::queue_monitor::QueueMonitor;
use super::shards::priority;
use super::topology::Topology;
use super::unsettled::Unsettled;
use crate::amqp::{self, Connection, Reconnector, SessionError, within_deadline};
use crate::queue::consumer::Prefetch;
use runtime::Status;

/// How many deliveries are requeued together.
const REQUEUED_TOGETHER: usize = 1_000;

/// A consumer of the queue. It has its own connection, because the broker does not read acks from a
/// publishing connection that it has blocked.
pub(crate) struct Consumer {
    /// Identifies this consumer among those of a shard, in all of its sessions.
    identity: u64,
    prefetch: Prefetch,
    publisher: Publisher,
    session: Option<Session>,
    reconnector: Reconnector,
}

struct Session {
    // Dropped before the connection, which it uses.
    monitor: QueueMonitor,
    connection: Arc<Connection>,
    channel: Channel,
    /// The main queue, and then the shards.
    queues: Vec<WorkQueue>,
    /// The deliveries of all consumers. The prefetches of the consumers of a queue add up to
    /// `prefetch`.
    deliveries: Deliveries,
    /// The tags of those consumers.
    tags: Vec<ShortString>,
    /// The prefetch of each queue.
    prefetch: u16,
    /// Deliveries that are being requeued.
    given_back: Vec<Acker>,
    settlement: Arc<SettlementContext>,
}

/// A queue to consume from.
#[derive(Clone)]
struct WorkQueue {
    name: ShortString,
    /// The priority of this consumer; `None` if RabbitMQ delivers to all consumers in turn.
    priority: Option<i32>,
}

/// What one consumer of the channel yields.
enum Event {
    // Boxed, because it is much larger than the other variant.
    Delivery(lapin::Result<Box<message::Delivery>>),
    /// The consumer with this tag has ended.
    Ended(ShortString),
}

type Events = Pin<Box<dyn Stream<Item = Event> + Send + Sync>>;

/// The deliveries of several consumers of a channel, merged in the order in which the broker sent
/// them. In another order, few of their acks would form a prefix, see [`AckBatcher`].
#[derive(Default)]
struct Deliveries(Vec<Peekable<Events>>);

impl Deliveries {
    /// The next event; `None` if all consumers have ended.
    async fn next(&mut self) -> Option<Event> {
        poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        let (mut first, mut is_pending) = (None, false);
        for consumer in &mut self.0 {
            match Pin::new(&mut *consumer).poll_peek(context) {
                Poll::Ready(Some(event)) => {
                    let position = event.position();
                    if first.as_ref().is_none_or(|(least, _)| position < *least) {
                        first = Some((position, consumer));
                    }
                }
                Poll::Ready(None) => {}
                Poll::Pending => is_pending = true,
            }
        }
        match first {
            Some((_, consumer)) => consumer.poll_next_unpin(context),
            None if is_pending => Poll::Pending,
            None => Poll::Ready(None),
        }
    }
}

impl Event {
    /// The place of a delivery in the order of the channel. Anything else comes first.
    fn position(&self) -> u64 {
        match self {
            Self::Delivery(Ok(delivery)) => delivery.delivery_tag,
            Self::Delivery(Err(_)) | Self::Ended(_) => 0,
        }
    }
}

impl Consumer {
    pub(crate) fn new(name: &str, prefetch: Prefetch, publisher: Publisher) -> Self {
        let reconnector = Reconnector::new((*publisher.access).clone(), name);
        Self { identity: rand::random(), prefetch, publisher, session: None, reconnector }
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.reconnector.status()
    }

    pub(crate) async fn next(&mut self) -> Delivery {
        loop {
            let session = if let Some(session) = &mut self.session {
                session
            } else {
                let (publisher, identity, prefetch) =
                    (&self.publisher, self.identity, self.prefetch);
                let start = |connection| Session::start(connection, publisher, identity, prefetch);
                self.session.insert(self.reconnector.open(start).await)
            };
            match session.next(&mut self.reconnector).await {
                Ok(received) => return Delivery::new(received, Arc::clone(&session.settlement)),
                Err(reason) => self.end_session(reason),
            }
        }
    }

    /// Drops the session. The broker then requeues its unsettled deliveries.
    fn end_session(&mut self, reason: String) {
        match self.session.take() {
            Some(Session { monitor, .. })
                if monitor.is_starving() || monitor.has_queue_without_consumer() =>
            {
                self.reconnector.mark_unhealthy(reason);
            }
            _ => self.reconnector.mark_closed(reason),
        }
    }

    pub(crate) async fn set_prefetch(&mut self, prefetch: Prefetch) {
        self.prefetch = prefetch;
        let Some(session) = &mut self.session else { return };
        if let Err(reason) = session.set_prefetch(prefetch).await {
            self.end_session(reason);
        }
    }

    pub(crate) async fn stop(&mut self) {
        let Some(session) = &mut self.session else { return };
        // After an error, the session is broken. The broker requeues the deliveries when the
        // session ends.
        if let Err(error) = session.give_back().await {
            tracing::debug!(error, "cannot cancel the consumer");
        }
        self.reconnector.mark_blocked("stopped".to_owned());
    }

    pub(crate) async fn close(self) {
        let Some(session) = self.session else { return };
        let flushed = session.flush_acks(&self.publisher.topology.queue);
        if let Err(error) = within_deadline(flushed).await {
            tracing::warn!(
                error,
                "the broker may not have applied the last acks; it may deliver their messages again"
            );
        }
        amqp::close(&session.connection).await;
    }
}

/// Adds a consumer with its own `prefetch` to the channel.
async fn consume(
    channel: &Channel,
    queue: &WorkQueue,
    prefetch: u16,
) -> lapin::Result<lapin::Consumer> {
    channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
    let mut arguments = FieldTable::default();
    if let Some(priority) = queue.priority {
        arguments.insert("x-priority".into(), AMQPValue::LongInt(priority));
    }
    let options = BasicConsumeOptions::default();
    channel.basic_consume(queue.name.clone(), "".into(), options, arguments).await
}

// Decision: docs/decisions/0078-how-are-objects-distributed-over-shards.md
/// The main queue and all shards, with this consumer's priorities.
fn work_queues(
    topology: &Topology,
    further_shards: &[ShortString],
    identity: u64,
) -> Vec<WorkQueue> {
    let main = WorkQueue { name: topology.queue.clone(), priority: None };
    let shards = (0..).zip(topology.shards.iter().chain(further_shards));
    let shards = shards.map(|(shard, name)| WorkQueue {
        name: name.clone(),
        priority: Some(priority(identity, shard)),
    });
    std::iter::once(main).chain(shards).collect()
}

fn with_end_event(consumer: lapin::Consumer) -> Events {
    let tag = consumer.tag();
    Box::pin(
        consumer
            .map(|delivery| Event::Delivery(delivery.map(Box::new)))
            .chain(once(async { Event::Ended(tag) })),
    )
}

impl Session {
    async fn start(
        connection: Connection,
        publisher: &Publisher,
        identity: u64,
        prefetch: Prefetch,
    ) -> Result<Self, SessionError> {
        let topology = &publisher.topology;
        topology.declare(&connection).await?;
        let further_shards =
            topology.further_shards(&connection).await.map_err(SessionError::Consume)?;
        let queues = work_queues(topology, &further_shards, identity);
        let prefetch = prefetch.of_each(queues.len());
        let channel = connection.create_channel().await.map_err(SessionError::OpenChannel)?;
        let connection = Arc::new(connection);
        let unsettled = Arc::new(Unsettled::default());
        let monitor = QueueMonitor::start(
            &connection,
            Arc::clone(topology),
            further_shards,
            Arc::clone(&unsettled),
            Arc::clone(&publisher.expiry),
            prefetch,
        );
        let settlement = Arc::new(SettlementContext {
            publisher: publisher.clone(),
            acks: AckBatcher::start(),
            unsettled,
            kept_channel: OnceLock::new(),
        });
        let mut session = Self {
            monitor,
            connection,
            channel,
            queues,
            tags: Vec::new(),
            deliveries: Deliveries::default(),
            prefetch,
            given_back: Vec::new(),
            settlement,
        };
        session.consume_all(prefetch).await.map_err(SessionError::Consume)?;
        Ok(session)
    }

    /// Adds a consumer with this prefetch for each queue.
    async fn consume_all(&mut self, prefetch: u16) -> lapin::Result<()> {
        for queue in &self.queues {
            let consumer = consume(&self.channel, queue, prefetch).await?;
            self.tags.push(consumer.tag());
            self.deliveries.0.push(with_end_event(consumer).peekable());
        }
        Ok(())
    }

    // Decision: docs/decisions/0025-how-does-max-consumers-change-at-run-time.md
    /// Changes the prefetch. RabbitMQ cannot change the prefetch of an existing consumer. A larger
    /// prefetch therefore adds a consumer for the difference, and a smaller prefetch replaces all
    /// consumers. With shards, it always replaces them, because a shard delivers to one consumer
    /// only.
    async fn set_prefetch(&mut self, prefetch: Prefetch) -> Result<(), String> {
        let prefetch = prefetch.of_each(self.queues.len());
        let added = match prefetch.checked_sub(self.prefetch) {
            Some(0) => return Ok(()),
            Some(added) if self.queues.len() == 1 => added,
            _ => {
                self.give_back().await?;
                prefetch
            }
        };
        within_deadline(self.consume_all(added)).await?;
        self.prefetch = prefetch;
        self.monitor.set_prefetch(prefetch);
        Ok(())
    }

    /// Cancels all consumers and requeues the deliveries that the caller has not received yet.
    /// Deliveries in flight can still be settled.
    ///
    /// There may be many thousand deliveries, so each step has its own deadline. This future may be
    /// dropped and started again.
    async fn give_back(&mut self) -> Result<(), String> {
        // Keep each tag until its consumer is cancelled: a consumer that is not cancelled would
        // receive the requeued deliveries again without end.
        while let Some(tag) = self.tags.last().cloned() {
            let cancelled = self.channel.basic_cancel(tag, BasicCancelOptions::default());
            within_deadline(cancelled).await?;
            self.tags.pop();
        }
        while let Some(event) = self.next_to_give_back().await? {
            if let Event::Delivery(delivery) = event {
                self.given_back.push(delivery.map_err(|error| error.to_string())?.acker);
            }
            if self.given_back.len() == REQUEUED_TOGETHER {
                self.requeue().await?;
            }
        }
        self.requeue().await?;
        self.deliveries.0.clear();
        Ok(())
    }

    /// The next event of the cancelled consumers; `None` after the last.
    async fn next_to_give_back(&mut self) -> Result<Option<Event>, String> {
        within_deadline(async { Ok::<_, String>(self.deliveries.next().await) }).await
    }

    /// Requeues the deliveries in `given_back`. An acker sends one nack only, even if this future is
    /// dropped and started again.
    async fn requeue(&mut self) -> Result<(), String> {
        let nacks = self.given_back.iter().map(|delivery| delivery.nack(REQUEUE));
        within_deadline(try_join_all(nacks)).await?;
        self.given_back.clear();
        Ok(())
    }

    // Decision: docs/decisions/0035-how-are-acks-flushed-before-a-close.md
    /// Makes sure that every ack that was sent reaches the queue, even if the channel is closed
    /// right after.
    ///
    /// RabbitMQ's channel process buffers acks while 33 commands are pending at a quorum queue, and
    /// discards the buffer when the channel is closed. The response to a `basic.get` shows that the
    /// queue has applied the pending acks, and therefore that the channel process has sent the
    /// buffered ones. The response to a passive declaration would not show this, because RabbitMQ
    /// sends it without waiting for pending commands.
    ///
    /// RabbitMQ rejects a `basic.get` from a shard, so this covers only the main queue. The acks of a
    /// shard that are discarded cost repeated lookups.
    async fn flush_acks(&self, queue: &ShortString) -> lapin::Result<()> {
        depths::count_ready(&self.channel, queue).await.map(drop)
    }

    // Decision: docs/decisions/0005-what-happens-to-deliveries-of-a-deleted-queue.md
    /// Keeps the channel open for deliveries in flight, so that they can be settled after this
    /// session has ended. If the queue was deleted, they may be the only copies of their messages.
    async fn keep_channel(&mut self) {
        // A consumer that stayed on the channel would receive messages that nothing polls.
        let is_cancelled = self.tags.is_empty() || self.give_back().await.is_ok();
        if is_cancelled {
            let kept = (self.channel.clone(), Arc::clone(&self.connection));
            _ = self.settlement.kept_channel.set(kept);
        }
    }

    /// Returns the next delivery, or the reason why the session has ended.
    async fn next(&mut self, reconnector: &mut Reconnector) -> Result<message::Delivery, String> {
        let _wait = self.monitor.start_wait();
        loop {
            // Without this check, the session would seem healthy, but no delivery could be settled.
            if self.settlement.acks.has_stopped() {
                return Err("the task that sends acks has stopped".to_owned());
            }
            // Check this even while other queues deliver.
            if self.monitor.has_queue_without_consumer() {
                return Err(
                    "the broker has lost the consumers of a queue that is not empty".to_owned()
                );
            }
            // The stream can stop without ending, so check the connection each second as well.
            match timeout(Duration::from_secs(1), self.deliveries.next()).await {
                Ok(Some(Event::Delivery(Ok(delivery)))) if delivery.acker.usable() => {
                    reconnector.mark_healthy();
                    return Ok(*delivery);
                }
                // lapin buffered this delivery before the channel was lost. The broker delivers the
                // message again.
                Ok(Some(Event::Delivery(Ok(_)))) => return Err("the channel is lost".to_owned()),
                Ok(Some(Event::Delivery(Err(error)))) => return Err(error.to_string()),
                Ok(Some(Event::Ended(tag))) => {
                    self.tags.retain(|other| *other != tag);
                    self.keep_channel().await;
                    return Err("the broker cancelled the consumer: its queue was deleted, or it \
                                held a message for longer than the broker's consumer timeout"
                        .to_owned());
                }
                Ok(None) => return Err("no consumer is left".to_owned()),
                Err(_) if self.monitor.queue_is_missing() => {
                    self.keep_channel().await;
                    return Err("the queue is gone".to_owned());
                }
                Err(_) if !self.connection.status().connected() => {
                    return Err("the connection is closed".to_owned());
                }
                Err(_) if !self.channel.status().connected() => {
                    return Err("the channel is closed".to_owned());
                }
                // A new session may get deliveries.
                Err(_) if self.monitor.is_starving() => {
                    return Err(
                        "the broker gives nothing although the queue is not empty".to_owned()
                    );
                }
                Err(_) if self.monitor.is_cut_off() => {
                    return Err(
                        "the queue does not answer: the broker's node may be cut off from \
                                its cluster"
                            .to_owned(),
                    );
                }
                Err(_) if self.monitor.has_ended() => {
                    return Err("the queue monitor has stopped".to_owned());
                }
                Err(_) if self.monitor.nothing_is_due() => reconnector.mark_healthy(),
                Err(_) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream::iter;

    use super::*;

    fn consumer(tags: &'static [u64]) -> Peekable<Events> {
        let delivery = |tag| message::Delivery::mock(tag, "".into(), "".into(), false, Vec::new());
        let events: Events =
            Box::pin(iter(tags).map(move |tag| Event::Delivery(Ok(Box::new(delivery(*tag))))));
        events.peekable()
    }

    #[tokio::test]
    async fn deliveries_of_several_consumers_keep_their_order() {
        let mut deliveries =
            Deliveries(vec![consumer(&[2, 5, 6]), consumer(&[1, 4]), consumer(&[3])]);
        for tag in 1..=6 {
            assert_eq!(deliveries.next().await.unwrap().position(), tag);
        }
        assert!(deliveries.next().await.is_none());
    }
}
