//! Receives deliveries from RabbitMQ.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use backon::ExponentialBackoff;
use futures_util::stream::{SelectAll, once};
use futures_util::{Stream, StreamExt as _};
use lapin::options::{BasicCancelOptions, BasicConsumeOptions, BasicGetOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, message};
use tokio::sync::watch;
use tokio::time::timeout;

use super::ack_batcher::AckBatcher;
use super::delivery::{Delivery, REQUEUE, SettlementContext};
use super::link::{self, Link, LinkError, OutageLog, RPC_TIMEOUT};
use super::publisher::Publisher;
use super::queue_monitor::QueueMonitor;
use super::topology::Topology;
use super::unsettled::Unsettled;
use crate::{LinkStatus, backoff};

/// A consumer of the queue. It has its own connection, because the broker does not read acks from a
/// publishing connection that it has blocked.
pub(crate) struct Consumer {
    name: String,
    prefetch: u16,
    publisher: Publisher,
    status: watch::Sender<LinkStatus>,
    session: Option<Session>,
    outage: OutageLog,
    delays: ExponentialBackoff,
    connected_at: Instant,
    /// Whether a session got no delivery although the queue was not empty, and no session since
    /// then has been healthy.
    is_starving: bool,
}

struct Session {
    // Dropped before the connection, which it uses.
    monitor: QueueMonitor,
    connection: Arc<Link>,
    channel: Channel,
    /// The deliveries of one or more consumers, whose prefetches add up to `prefetch`.
    deliveries: SelectAll<Events>,
    tags: Vec<ShortString>,
    prefetch: u16,
    settlement: Arc<SettlementContext>,
    status: watch::Sender<LinkStatus>,
    /// Whether `status` is `Ok`.
    is_healthy: bool,
}

/// What one consumer of the channel yields.
enum Event {
    // Boxed, because it is much larger than the other variant.
    Delivery(lapin::Result<Box<message::Delivery>>),
    /// The consumer with this tag has ended, which `SelectAll` alone would not show.
    Ended(ShortString),
}

type Events = Pin<Box<dyn Stream<Item = Event> + Send + Sync>>;

impl Consumer {
    pub(crate) fn new(name: &str, prefetch: u16, publisher: Publisher) -> Self {
        let (status, _) = watch::channel(Err("not connected yet".to_owned()));
        Self {
            name: name.to_owned(),
            prefetch,
            publisher,
            status,
            session: None,
            outage: OutageLog::default(),
            delays: backoff(),
            connected_at: Instant::now(),
            is_starving: false,
        }
    }

    pub(crate) fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.subscribe()
    }

    pub(crate) async fn next(&mut self) -> Delivery {
        loop {
            let reason = match &mut self.session {
                Some(session) => match session.next().await {
                    Ok(received) => {
                        return Delivery::new(received, Arc::clone(&session.settlement));
                    }
                    Err(reason) => reason,
                },
                None => match self.open().await {
                    Ok(session) => {
                        let session = self.session.insert(session);
                        self.connected_at = Instant::now();
                        self.outage.up(&self.name);
                        if !self.is_starving {
                            session.mark_healthy();
                        }
                        continue;
                    }
                    Err(error) => error.to_string(),
                },
            };
            self.end_session(reason);
            tokio::time::sleep(self.delays.next().unwrap_or(Duration::from_secs(1))).await;
        }
    }

    /// Drops the session. The broker then requeues its unsettled deliveries.
    fn end_session(&mut self, reason: String) {
        if let Some(session) = self.session.take() {
            self.is_starving = session.monitor.is_starving() || !session.is_healthy;
            if self.connected_at.elapsed() > Duration::from_secs(5) {
                self.delays = backoff();
            }
        }
        self.outage.down(&self.name, &reason);
        _ = self.status.send_replace(Err(reason));
    }

    pub(crate) async fn set_prefetch(&mut self, prefetch: u16) {
        self.prefetch = prefetch;
        let queue = self.publisher.topology().queue.clone();
        let Some(session) = &mut self.session else { return };
        match timeout(RPC_TIMEOUT, session.set_prefetch(queue, prefetch)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => self.end_session(error.to_string()),
            Err(late) => self.end_session(late.to_string()),
        }
    }

    pub(crate) async fn stop(&mut self) {
        let Some(session) = &mut self.session else { return };
        match timeout(RPC_TIMEOUT, session.give_back()).await {
            Ok(Ok(())) => {}
            // The session is broken. When it ends, the broker requeues the deliveries.
            Ok(Err(error)) => tracing::debug!(%error, "cannot cancel the consumer"),
            Err(_) => tracing::debug!("the broker did not confirm the cancel in time"),
        }
        _ = self.status.send_replace(Err("stopped".to_owned()));
    }

    pub(crate) async fn close(self) {
        let Some(session) = self.session else { return };
        let flushed = session.flush_acks(&self.publisher.topology().queue);
        let in_doubt = match timeout(RPC_TIMEOUT, flushed).await {
            Ok(flushed) => flushed.err().map(|error| error.to_string()),
            Err(late) => Some(late.to_string()),
        };
        if let Some(error) = in_doubt {
            tracing::warn!(
                error,
                "the broker may not have applied the last acks; it may deliver their messages again"
            );
        }
        link::close(&session.connection).await;
    }

    async fn open(&self) -> Result<Session, LinkError> {
        let connection = link::connect(&self.publisher.config().access, &self.name).await?;
        let topology: &Topology = self.publisher.topology();
        timeout(RPC_TIMEOUT, topology.declare(&connection)).await??;
        let channel = timeout(RPC_TIMEOUT, connection.create_channel()).await?;
        let channel = channel.map_err(LinkError::OpenChannel)?;
        let consuming = consume(&channel, topology.queue.clone(), self.prefetch);
        let consumer = timeout(RPC_TIMEOUT, consuming).await?.map_err(LinkError::Consume)?;
        let connection = Arc::new(connection);
        let unsettled = Arc::new(Unsettled::default());
        let monitor = QueueMonitor::start(
            &connection,
            topology.clone(),
            Arc::clone(&unsettled),
            Arc::clone(self.publisher.expiry()),
            self.prefetch,
        );
        let settlement = Arc::new(SettlementContext {
            publisher: self.publisher.clone(),
            acks: AckBatcher::start(),
            unsettled,
            kept_channel: OnceLock::new(),
        });
        let status = self.status.clone();
        Ok(Session {
            monitor,
            connection,
            channel,
            tags: vec![consumer.tag()],
            deliveries: SelectAll::from_iter([with_end_event(consumer)]),
            prefetch: self.prefetch,
            settlement,
            status,
            is_healthy: false,
        })
    }
}

/// Adds a consumer with its own `prefetch` to the channel.
async fn consume(
    channel: &Channel,
    queue: ShortString,
    prefetch: u16,
) -> lapin::Result<lapin::Consumer> {
    channel.basic_qos(prefetch, BasicQosOptions::default()).await?;
    let options = BasicConsumeOptions::default();
    channel.basic_consume(queue, "".into(), options, FieldTable::default()).await
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
    // Decision: docs/decisions/0025-how-does-max-consumers-change-at-run-time.md
    /// Changes the prefetch. RabbitMQ cannot change the prefetch of an existing consumer, so a
    /// larger prefetch adds a consumer for the difference, and a smaller one replaces all
    /// consumers.
    async fn set_prefetch(&mut self, queue: ShortString, prefetch: u16) -> lapin::Result<()> {
        let added = match prefetch.checked_sub(self.prefetch) {
            Some(0) => return Ok(()),
            Some(added) => added,
            None => {
                self.give_back().await?;
                prefetch
            }
        };
        let consumer = consume(&self.channel, queue, added).await?;
        self.tags.push(consumer.tag());
        self.deliveries.push(with_end_event(consumer));
        self.prefetch = prefetch;
        self.monitor.set_prefetch(prefetch);
        Ok(())
    }

    /// Cancels all consumers and requeues the deliveries that the caller has not received yet.
    /// Deliveries in flight can still be settled.
    async fn give_back(&mut self) -> lapin::Result<()> {
        // Keep each tag until its consumer is cancelled, because this future may be dropped and
        // started again. A consumer that is not cancelled would receive the requeued deliveries
        // again without end.
        while let Some(tag) = self.tags.last().cloned() {
            self.channel.basic_cancel(tag, BasicCancelOptions::default()).await?;
            self.tags.pop();
        }
        while let Some(event) = self.deliveries.next().await {
            if let Event::Delivery(delivery) = event {
                delivery?.nack(REQUEUE).await?;
            }
        }
        Ok(())
    }

    // Decision: docs/decisions/0035-how-are-acks-flushed-before-a-close.md
    /// Makes sure that every ack that was sent reaches the queue, even if the channel is closed
    /// right after.
    ///
    /// RabbitMQ's channel process has at most 33 commands pending at a quorum queue. It buffers
    /// further acks until those are applied, and discards them when the channel is closed. A
    /// `basic.get` follows the pending acks to the queue, and its response follows the notice that
    /// they are applied, upon which the channel sends the buffered acks. The queue receives these
    /// before the close, because the same process sends both. A passive declaration does not
    /// suffice: its response does not wait for pending commands.
    async fn flush_acks(&self, queue: &ShortString) -> lapin::Result<()> {
        let got = self.channel.basic_get(queue.clone(), BasicGetOptions::default()).await?;
        if let Some(message) = got {
            message.nack(REQUEUE).await?;
        }
        Ok(())
    }

    // Decision: docs/decisions/0005-what-happens-to-deliveries-of-a-deleted-queue.md
    /// Keeps the channel open for deliveries in flight, so that they can be settled after this
    /// session has ended. If the queue was deleted, they may be the only copies of their messages.
    async fn keep_channel(&mut self) {
        // A consumer that stayed on the channel would receive messages that are never polled.
        let is_cancelled = self.tags.is_empty()
            || matches!(timeout(RPC_TIMEOUT, self.give_back()).await, Ok(Ok(())));
        if is_cancelled {
            let kept = (self.channel.clone(), Arc::clone(&self.connection));
            _ = self.settlement.kept_channel.set(kept);
        }
    }

    fn mark_healthy(&mut self) {
        if !std::mem::replace(&mut self.is_healthy, true) {
            _ = self.status.send_replace(Ok(()));
        }
    }

    /// Returns the next delivery, or the reason why the session has ended.
    async fn next(&mut self) -> Result<lapin::message::Delivery, String> {
        let _wait = self.monitor.start_wait();
        loop {
            // Otherwise no delivery could be settled, and the session would seem healthy.
            if self.settlement.acks.has_died() {
                return Err("the task that sends acks has died".to_owned());
            }
            // The stream can stop without ending, so check the connection each second as well.
            match timeout(Duration::from_secs(1), self.deliveries.next()).await {
                Ok(Some(Event::Delivery(Ok(delivery)))) if delivery.acker.usable() => {
                    self.mark_healthy();
                    return Ok(*delivery);
                }
                // lapin had buffered it when the channel was lost. The broker delivers it again.
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
                Err(_) if self.monitor.has_ended() => {
                    return Err("the queue monitor has stopped".to_owned());
                }
                Err(_) if self.monitor.queue_is_empty() => self.mark_healthy(),
                Err(_) => {}
            }
        }
    }
}
