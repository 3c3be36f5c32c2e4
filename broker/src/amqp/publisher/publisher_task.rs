//! The task of a publisher: keeps a connection open and distributes the batches among its channels.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lapin::options::ConfirmSelectOptions;
use lapin::{Channel, Event};
use metrics::{Counter, Histogram};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::Batch;
use super::refusals::{Refusal, Refusals};
use super::round::{self, RoundError, RoundSummary};
use super::status_reporter::StatusReporter;
use crate::amqp::Config;
use crate::amqp::link::{self, Link, LinkError, RPC_TIMEOUT};
use crate::amqp::topology::Topology;
use crate::{PublishError, backoff};

/// Rounds that run concurrently, each on its own channel: while one waits for its confirms, the
/// next are published.
const CHANNELS: usize = 4;
/// A round collects batches until it has this many messages.
const ROUND_MESSAGES: usize = 1_000;
/// A round that takes longer ends the connection, unless the broker has blocked the connection.
/// Heartbeats do not count.
const STALL: Duration = Duration::from_secs(10);
/// A session that lasted longer resets the backoff.
const STABLE_AFTER: Duration = Duration::from_secs(5);

pub(super) struct PublisherTask {
    config: Arc<Config>,
    topology: Arc<Topology>,
    name: String,
    batches: mpsc::UnboundedReceiver<Batch>,
    reporter: StatusReporter,
    metrics: Metrics,
}

struct Session {
    connection: Link,
    channels: Vec<Channel>,
}

/// Why a session ended.
enum SessionEnd {
    /// All publishers are dropped and all messages are confirmed.
    Finished,
    Lost(String),
    /// A queue has refused every message for several seconds.
    Refused(Refusal),
}

impl PublisherTask {
    pub(super) fn new(
        config: Arc<Config>,
        topology: Arc<Topology>,
        name: &str,
        batches: mpsc::UnboundedReceiver<Batch>,
        reporter: StatusReporter,
    ) -> Self {
        let name = name.to_owned();
        Self { config, topology, name, batches, reporter, metrics: Metrics::new() }
    }

    pub(super) async fn run(mut self) {
        let mut delays = backoff();
        let mut delay = Duration::ZERO;
        loop {
            let opened = async {
                tokio::time::sleep(delay).await;
                open(&self.config, &self.topology, &self.name).await
            };
            match reject_batches_while(&mut self.batches, &self.reporter, opened).await {
                None => return,
                Some(Err(error)) => self.reporter.lost(error.to_string()),
                Some(Ok(session)) => {
                    self.reporter.opened();
                    let connected_at = Instant::now();
                    match self.serve(&session).await {
                        SessionEnd::Finished => {
                            link::close(&session.connection).await;
                            return;
                        }
                        SessionEnd::Lost(reason) => {
                            // Otherwise a connection that is lost again and again would be retried
                            // too often.
                            if connected_at.elapsed() > STABLE_AFTER {
                                delays = backoff();
                            }
                            self.reporter.lost(reason);
                        }
                        SessionEnd::Refused(refusal) => self.reporter.refused(refusal),
                    }
                }
            }
            delay = delays.next().unwrap_or(delay);
        }
    }

    /// Publishes batches until the connection is lost or all publishers are dropped.
    async fn serve(&mut self, Session { connection, channels }: &Session) -> SessionEnd {
        let mut rounds = FuturesUnordered::new();
        let mut free: Vec<usize> = (0..channels.len()).collect();
        let mut started: Vec<Option<Instant>> = vec![None; channels.len()];
        let mut events = std::pin::pin!(connection.events_listener());
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        let mut refusals = Refusals::default();
        // Once set, the session ends at the next tick. Until then, running rounds can still be
        // confirmed; otherwise their messages would also go to the spool and be delivered twice.
        let mut refusal: Option<Refusal> = None;
        let opened_at = Instant::now();
        let mut is_finishing = false;
        loop {
            tokio::select! {
                batch = self.batches.recv(),
                    if !free.is_empty() && !is_finishing && refusal.is_none() =>
                {
                    let Some(first) = batch else {
                        is_finishing = true;
                        if rounds.is_empty() { return SessionEnd::Finished; }
                        continue;
                    };
                    let batches = self.collect_round(first);
                    let Some(index) = free.pop() else { continue };
                    started[index] = Some(Instant::now());
                    let channel = &channels[index];
                    rounds.push(async move { (index, round::publish(channel, batches).await) });
                }
                Some((index, round)) = rounds.next() => {
                    started[index] = None;
                    let summary = match round {
                        Ok(summary) => summary,
                        Err(RoundError(reason)) => return SessionEnd::Lost(reason),
                    };
                    self.metrics.record(&summary);
                    for (queue, has_accepted) in summary.queues {
                        if has_accepted {
                            self.reporter.confirmed(queue.as_str());
                        }
                        refusals.record(index, queue, has_accepted, Instant::now());
                    }
                    if summary.unroutable > 0 {
                        // Decision: docs/decisions/0003-when-is-a-vanished-queue-declared-again.md
                        // The next session declares the queue, not this one. If a quorum queue is
                        // back before its consumers' channels notice the loss, it keeps those
                        // consumers, but the channels take its first messages for duplicates and
                        // drop them: they stay unacked until the connection ends (seen with
                        // RabbitMQ 3.10).
                        return SessionEnd::Lost("the queue is gone; declaring it again".to_owned());
                    }
                    free.push(index);
                    if rounds.is_empty() && let Some(refusal) = refusal.take() {
                        return SessionEnd::Refused(refusal);
                    }
                    if is_finishing && rounds.is_empty() { return SessionEnd::Finished; }
                }
                Some(event) = events.next() => match event {
                    Event::Error(error) => return SessionEnd::Lost(error.to_string()),
                    Event::ConnectionBlocked(reason) => self.reporter.blocked(&reason),
                    Event::ConnectionUnblocked => self.reporter.unblocked(),
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
                    let oldest = started.iter().flatten().min();
                    if oldest.is_some_and(|started| started.elapsed() > STALL) {
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
                    // would clear it.
                    let is_unverified = refusals.is_empty() && opened_at.elapsed() > STABLE_AFTER;
                    if self.reporter.is_refused() && is_unverified {
                        self.reporter.clear_refusal();
                    }
                }
            }
        }
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
        // Skip batches whose callers have reached their deadline: those have reported a failure.
        batches.retain(|batch| !batch.reply.is_closed());
        batches
    }
}

/// Opens a session: connects, declares the queues, and opens the channels in confirm mode.
async fn open(config: &Config, topology: &Topology, name: &str) -> Result<Session, LinkError> {
    let connection = link::connect(&config.access, name).await?;
    timeout(RPC_TIMEOUT, topology.declare(&connection)).await??;
    let channels = timeout(RPC_TIMEOUT, async {
        let mut channels = Vec::with_capacity(CHANNELS);
        for _ in 0..CHANNELS {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            channels.push(channel);
        }
        Ok(channels)
    });
    let channels = channels.await?.map_err(LinkError::OpenChannel)?;
    Ok(Session { connection, channels })
}

/// Awaits `opening` and rejects all batches meanwhile, so that no caller waits for a broker that is
/// away. Returns `None` when all publishers are dropped.
async fn reject_batches_while<T>(
    batches: &mut mpsc::UnboundedReceiver<Batch>,
    reporter: &StatusReporter,
    opening: impl Future<Output = T>,
) -> Option<T> {
    let mut opening = std::pin::pin!(opening);
    loop {
        tokio::select! {
            opened = &mut opening => return Some(opened),
            batch = batches.recv() => {
                // An error means that the caller has stopped waiting.
                let _ = batch?.reply.send(Err(PublishError::Away(reporter.reason())));
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
