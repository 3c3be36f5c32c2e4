//! The tokio task of a publisher: keeps a connection open, and distributes the batches among the
//! channels of the connection.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::try_join_all;
use futures_util::stream::FuturesUnordered;
use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, Event};
use metrics::{Counter, Histogram};
use tokio::sync::{mpsc, watch};

use super::refusals::{Refusal, Refusals};
use super::round::{self, Batch, RoundSummary};
use crate::amqp::{self, Connection, Reconnector, STABLE_AFTER, SessionError};
use crate::queue::amqp::topology::Topology;
use crate::queue::error::PublishError;
use runtime::Status;

/// Rounds that run concurrently, each on its own channel: while one waits for its confirms, the
/// next are published.
const CHANNELS: usize = 4;
/// A round collects batches until it has this many messages.
const ROUND_MESSAGES: usize = 1_000;
/// How often to check whether the shards have consumers.
const SHARDS_INTERVAL: Duration = Duration::from_secs(5);
/// A round that takes longer than this ends the session, unless the broker has blocked the
/// connection. Heartbeats do not count as progress. No caller waits longer than 5 s for its confirm.
const STALL: Duration = Duration::from_secs(6);

pub(super) struct PublisherTask {
    topology: Arc<Topology>,
    batches: mpsc::UnboundedReceiver<Batch>,
    reconnector: Reconnector,
    /// The refusal that ended an earlier session. The status reports it until the queue confirms a
    /// message.
    refusal: Option<Refusal>,
    metrics: Metrics,
}

struct Session {
    connection: Connection,
    channels: Vec<Channel>,
}

enum SessionEnd {
    /// All publishers are dropped and all messages are confirmed.
    Finished,
    Lost(String),
    /// A queue has refused every message for several seconds.
    Refused(Refusal),
}

impl PublisherTask {
    pub(super) fn new(
        topology: Arc<Topology>,
        batches: mpsc::UnboundedReceiver<Batch>,
        reconnector: Reconnector,
    ) -> Self {
        Self { topology, batches, reconnector, refusal: None, metrics: Metrics::new() }
    }

    pub(super) async fn run(mut self) {
        let status = self.reconnector.status();
        loop {
            let opening = self.reconnector.open(|connection| open(connection, &self.topology));
            let opened = reject_batches_while(&mut self.batches, &status, opening).await;
            let Some(session) = opened else { return };
            let topology = Arc::clone(&self.topology);
            let end = tokio::select! {
                biased;
                end = self.serve(&session) => end,
                never = watch_shards(&topology, &session.connection) => match never {},
            };
            match end {
                SessionEnd::Finished => return amqp::close(&session.connection).await,
                SessionEnd::Lost(reason) => self.reconnector.mark_closed(reason),
                SessionEnd::Refused(refusal) => {
                    self.reconnector.mark_unhealthy(refusal.reason());
                    self.refusal = Some(refusal);
                }
            }
        }
    }

    /// Publishes batches until the connection is lost or all publishers are dropped.
    async fn serve(&mut self, Session { connection, channels }: &Session) -> SessionEnd {
        let mut rounds = FuturesUnordered::new();
        let mut free_channels: Vec<usize> = (0..channels.len()).collect();
        // When the round on each channel started.
        let mut started_at: Vec<Option<Instant>> = vec![None; channels.len()];
        let mut events = pin!(connection.events_listener());
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        let mut refusals = Refusals::default();
        // Once this is set, the session ends at the next tick. Until then, the broker can still
        // confirm running rounds. If the session ended at once, the messages of those rounds would
        // also go to the spool, and be delivered twice.
        let mut refusal: Option<Refusal> = None;
        let opened_at = Instant::now();
        let mut is_finishing = false;
        loop {
            tokio::select! {
                batch = self.batches.recv(),
                    if !free_channels.is_empty() && !is_finishing && refusal.is_none() =>
                {
                    let Some(first) = batch else {
                        is_finishing = true;
                        if rounds.is_empty() { return SessionEnd::Finished; }
                        continue;
                    };
                    let batches = self.collect_round(first);
                    let Some(index) = free_channels.pop() else { continue };
                    started_at[index] = Some(Instant::now());
                    let channel = &channels[index];
                    rounds.push(async move { (index, round::publish(channel, batches).await) });
                }
                Some((index, round)) = rounds.next() => {
                    started_at[index] = None;
                    let summary = match round {
                        Ok(summary) => summary,
                        Err(reason) => return SessionEnd::Lost(reason),
                    };
                    self.metrics.record(&summary);
                    for (queue, has_accepted) in summary.queues {
                        if has_accepted && self.refusal.as_ref().is_some_and(|it| it.queue == queue) {
                            self.clear_refusal();
                        }
                        refusals.record(index, queue, has_accepted, Instant::now());
                    }
                    if summary.unroutable > 0 {
                        // Decision: docs/decisions/0003-when-is-a-vanished-queue-declared-again.md
                        // The next session declares the queue, not this one. If a quorum queue is
                        // back before the channels of its consumers notice the loss, the queue
                        // keeps those consumers, but their channels take its first messages for
                        // duplicates and drop them. The dropped messages stay unacked until the
                        // connection ends (seen with RabbitMQ 3.10).
                        return SessionEnd::Lost("the queue is gone; declaring it again".to_owned());
                    }
                    free_channels.push(index);
                    if rounds.is_empty() && let Some(refusal) = refusal.take() {
                        return SessionEnd::Refused(refusal);
                    }
                    if is_finishing && rounds.is_empty() { return SessionEnd::Finished; }
                }
                Some(event) = events.next() => match event {
                    Event::Error(error) => return SessionEnd::Lost(error.to_string()),
                    Event::ConnectionBlocked(reason) => self.report_blocked(&reason),
                    Event::ConnectionUnblocked => self.report_unblocked(),
                    _ => {}
                },
                _ = ticks.tick() => {
                    let is_open = |channel: &Channel| channel.status().connected();
                    if !connection.status().connected() || !channels.iter().all(is_open) {
                        return SessionEnd::Lost("the connection is closed".to_owned());
                    }
                    if connection.status().blocked() {
                        continue;
                    }
                    let oldest = started_at.iter().flatten().min();
                    if oldest.is_some_and(|started_at| started_at.elapsed() > STALL) {
                        return SessionEnd::Lost(format!("no confirm for {STALL:?}"));
                    }
                    if let Some(refusal) = refusal.take() {
                        return SessionEnd::Refused(refusal);
                    }
                    refusal = refusals.lasting(Instant::now());
                    if rounds.is_empty() && let Some(refusal) = refusal.take() {
                        return SessionEnd::Refused(refusal);
                    }
                    // While the status is an error, callers may publish nothing, so no confirm
                    // would clear the refusal.
                    let is_unverified = refusals.is_empty() && opened_at.elapsed() > STABLE_AFTER;
                    if self.refusal.is_some() && is_unverified {
                        self.clear_refusal();
                    }
                }
            }
        }
    }

    /// Reports that the broker is short of memory or disk and has blocked the connection, which
    /// stays open.
    fn report_blocked(&mut self, reason: &str) {
        tracing::warn!(
            connection = self.reconnector.name(),
            reason,
            "the broker has blocked publishing until it has enough memory and disk space"
        );
        self.reconnector.mark_blocked(format!("blocked: {reason}"));
    }

    fn report_unblocked(&mut self) {
        let connection = self.reconnector.name();
        tracing::info!(connection, "the broker accepts messages again");
        self.reconnector.mark_unblocked();
    }

    /// Stops reporting the refusal of an earlier session.
    fn clear_refusal(&mut self) {
        self.refusal = None;
        self.reconnector.mark_healthy();
    }

    /// Collects the batches of a round: `first`, and those that wait in the channel.
    fn collect_round(&mut self, first: Batch) -> Vec<Batch> {
        let mut messages = first.messages.len();
        let mut batches = vec![first];
        while messages < ROUND_MESSAGES {
            let Ok(batch) = self.batches.try_recv() else { break };
            messages += batch.messages.len();
            batches.push(batch);
        }
        // Skip batches whose callers have reached their deadline and already reported a failure.
        batches.retain(|batch| !batch.reply.is_closed());
        batches
    }
}

/// Declares the queues, and opens the channels in confirm mode.
async fn open(connection: Connection, topology: &Topology) -> Result<Session, SessionError> {
    topology.declare(&connection).await?;
    topology.check_shards(&connection).await;
    let opening = (0..CHANNELS).map(async |_| {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(channel)
    });
    let channels = try_join_all(opening).await.map_err(SessionError::OpenChannel)?;
    Ok(Session { connection, channels })
}

async fn watch_shards(topology: &Topology, connection: &Connection) -> Infallible {
    loop {
        tokio::time::sleep(SHARDS_INTERVAL).await;
        topology.check_shards(connection).await;
    }
}

/// Awaits `opening` and rejects all batches meanwhile, so that no caller waits for a broker that is
/// away. Returns `None` when all publishers are dropped.
async fn reject_batches_while<T>(
    batches: &mut mpsc::UnboundedReceiver<Batch>,
    status: &watch::Receiver<Status>,
    opening: impl Future<Output = T>,
) -> Option<T> {
    let mut opening = pin!(opening);
    loop {
        tokio::select! {
            // Poll `opening` first, because callers may send batches as soon as the session is
            // open.
            biased;
            opened = &mut opening => return Some(opened),
            batch = batches.recv() => {
                let reason = status.borrow().clone().err().unwrap_or_default();
                // An error means that the caller has stopped waiting.
                let _ = batch?.reply.send(Err(PublishError::Away(reason)));
            }
        }
    }
}

struct Metrics {
    confirmed: Counter,
    refused: Counter,
    unroutable: Counter,
    written: Histogram,
    until_confirmed: Histogram,
}

impl Metrics {
    fn new() -> Self {
        metrics::describe_histogram!(
            "lastseen_publish_write_seconds",
            metrics::Unit::Seconds,
            "Time until all frames of a round of messages were written."
        );
        metrics::describe_histogram!(
            "lastseen_publish_confirm_seconds",
            metrics::Unit::Seconds,
            "Time from the last written frame of a round until all of its messages were confirmed."
        );
        let outcome = |outcome| metrics::counter!("lastseen_published_total", "outcome" => outcome);
        Self {
            confirmed: outcome("confirmed"),
            refused: outcome("refused"),
            unroutable: outcome("unroutable"),
            written: metrics::histogram!("lastseen_publish_write_seconds"),
            until_confirmed: metrics::histogram!("lastseen_publish_confirm_seconds"),
        }
    }

    fn record(&self, summary: &RoundSummary) {
        self.confirmed.increment(summary.confirmed);
        self.refused.increment(summary.refused);
        self.unroutable.increment(summary.unroutable);
        self.written.record(summary.durations.written);
        self.until_confirmed.record(summary.durations.confirmed);
    }
}
