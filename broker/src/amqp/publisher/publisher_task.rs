//! The task behind a publisher: keeps a connection and spreads the batches over its channels.

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
use super::round::{self, Broken, Tally};
use super::status_reporter::Standing;
use crate::amqp::Config;
use crate::amqp::link::{self, Link, LinkError, RPC_TIMEOUT};
use crate::amqp::topology::Topology;
use crate::{PublishError, backoff};

/// Rounds that are under way at once, each on a channel of its own: while one waits for its
/// confirms, the next ones are published.
const CHANNELS: usize = 4;
/// A round takes batches until it has so many messages.
const ROUND_MESSAGES: usize = 1_000;
/// A round that takes longer, on a connection that is not blocked, ends the connection, even if its
/// heartbeats go on.
const STALL: Duration = Duration::from_secs(10);
/// A session that lasted so long was a good one: the next is tried for without further waiting.
const SETTLED: Duration = Duration::from_secs(5);

pub(super) struct Driver {
    config: Arc<Config>,
    topology: Arc<Topology>,
    name: String,
    batches: mpsc::UnboundedReceiver<Batch>,
    standing: Standing,
    counters: Counters,
}

struct Session {
    connection: Link,
    channels: Vec<Channel>,
}

/// Why a session is over.
enum Ended {
    /// Every publisher is gone and all is confirmed.
    Finished,
    Lost(String),
    /// A queue has refused every message for several seconds.
    Refused(Refusal),
}

impl Driver {
    pub(super) fn new(
        config: Arc<Config>,
        topology: Arc<Topology>,
        name: &str,
        batches: mpsc::UnboundedReceiver<Batch>,
        standing: Standing,
    ) -> Self {
        let name = name.to_owned();
        Self { config, topology, name, batches, standing, counters: Counters::new() }
    }

    pub(super) async fn run(mut self) {
        let mut waits = backoff();
        let mut wait = Duration::ZERO;
        loop {
            let opened = async {
                tokio::time::sleep(wait).await;
                open(&self.config, &self.topology, &self.name).await
            };
            match refusing(&mut self.batches, &self.standing, opened).await {
                None => return,
                Some(Err(error)) => self.standing.lost(error.to_string()),
                Some(Ok(session)) => {
                    self.standing.opened();
                    let connected_at = Instant::now();
                    match self.serve(&session).await {
                        Ended::Finished => {
                            link::close(&session.connection).await;
                            return;
                        }
                        Ended::Lost(reason) => {
                            // A link that breaks again and again is not hammered either.
                            if connected_at.elapsed() > SETTLED {
                                waits = backoff();
                            }
                            self.standing.lost(reason);
                        }
                        Ended::Refused(refusal) => self.standing.refused(refusal),
                    }
                }
            }
            wait = waits.next().unwrap_or(wait);
        }
    }

    /// Publishes batches until the connection is lost or nobody is left to publish for.
    async fn serve(&mut self, Session { connection, channels }: &Session) -> Ended {
        let mut rounds = FuturesUnordered::new();
        let mut free: Vec<usize> = (0..channels.len()).collect();
        let mut begun: Vec<Option<Instant>> = vec![None; channels.len()];
        let mut events = std::pin::pin!(connection.events_listener());
        let mut pulse = tokio::time::interval(Duration::from_secs(1));
        let mut refusals = Refusals::default();
        // Set once the session is to end for it. What is under way has until the next pulse to be confirmed, or
        // it would go to the spool as well and be delivered twice.
        let mut refusal: Option<Refusal> = None;
        let opened_at = Instant::now();
        let mut finishing = false;
        loop {
            tokio::select! {
                batch = self.batches.recv(), if !free.is_empty() && !finishing && refusal.is_none() => {
                    let Some(first) = batch else {
                        finishing = true;
                        if rounds.is_empty() { return Ended::Finished; }
                        continue;
                    };
                    let batches = self.gather(first);
                    let Some(place) = free.pop() else { continue };
                    begun[place] = Some(Instant::now());
                    let channel = &channels[place];
                    rounds.push(async move { (place, round::publish(channel, batches).await) });
                }
                Some((place, round)) = rounds.next() => {
                    begun[place] = None;
                    let tally = match round {
                        Ok(tally) => tally,
                        Err(Broken(reason)) => return Ended::Lost(reason),
                    };
                    self.counters.add(&tally);
                    for (queue, takes) in tally.queues {
                        if takes {
                            self.standing.confirmed(queue.as_str());
                        }
                        refusals.note(place, queue, takes, Instant::now());
                    }
                    if tally.unroutable > 0 {
                        // Decision: docs/decisions/0003-when-is-a-vanished-queue-declared-again.md
                        // The next session declares it, and not this one at once: a quorum queue that
                        // is back before its consumers' channels have noticed keeps them, but they
                        // take its first messages for ones that they had before and drop them,
                        // unacked until the connection ends (seen with 3.10).
                        return Ended::Lost("the queue is gone; declaring it again".to_owned());
                    }
                    free.push(place);
                    if rounds.is_empty() && let Some(refusal) = refusal.take() {
                        return Ended::Refused(refusal);
                    }
                    if finishing && rounds.is_empty() { return Ended::Finished; }
                }
                Some(event) = events.next() => match event {
                    Event::Error(error) => return Ended::Lost(error.to_string()),
                    Event::ConnectionBlocked(reason) => self.standing.blocked(&reason),
                    Event::ConnectionUnblocked => self.standing.unblocked(),
                    _ => {}
                },
                _ = pulse.tick() => {
                    let usable = |channel: &Channel| channel.status().connected();
                    if !connection.status().connected() || !channels.iter().all(usable) {
                        return Ended::Lost("the connection is closed".to_owned());
                    }
                    if connection.status().blocked() {
                        continue;
                    }
                    let oldest = begun.iter().flatten().min();
                    if oldest.is_some_and(|begun| begun.elapsed() > STALL) {
                        return Ended::Lost(format!("nothing was confirmed in {STALL:?}"));
                    }
                    if let Some(refusal) = refusal.take() {
                        return Ended::Refused(refusal);
                    }
                    refusal = refusals.lasting(Instant::now());
                    if rounds.is_empty() && let Some(refusal) = refusal.take() {
                        return Ended::Refused(refusal);
                    }
                    // Callers that were told to stay away cannot show that it takes messages again.
                    let is_untried = refusals.is_empty() && opened_at.elapsed() > SETTLED;
                    if self.standing.is_refused() && is_untried {
                        self.standing.forgive();
                    }
                }
            }
        }
    }

    /// The batches of a round: `first`, and what else has come in.
    fn gather(&mut self, first: Batch) -> Vec<Batch> {
        let mut messages = first.messages.len();
        let mut batches = vec![first];
        while messages < ROUND_MESSAGES {
            let Ok(batch) = self.batches.try_recv() else { break };
            messages += batch.messages.len();
            batches.push(batch);
        }
        // Whose caller has gone, its deadline being over, has been answered without it.
        batches.retain(|batch| !batch.reply.is_closed());
        batches
    }
}

/// Opens a session: the connection, the queues, and the channels, each of which confirms.
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

/// Awaits `opening` while it turns away every batch, so that nobody waits for a broker that is not
/// there. `None` when every publisher is gone.
async fn refusing<T>(
    batches: &mut mpsc::UnboundedReceiver<Batch>,
    standing: &Standing,
    opening: impl Future<Output = T>,
) -> Option<T> {
    let mut opening = std::pin::pin!(opening);
    loop {
        tokio::select! {
            opened = &mut opening => return Some(opened),
            batch = batches.recv() => {
                // A caller that has gone needs no answer.
                let _ = batch?.reply.send(Err(PublishError::Away(standing.reason())));
            }
        }
    }
}

struct Counters {
    confirmed: Counter,
    refused: Counter,
    unroutable: Counter,
    written: Histogram,
    until_confirmed: Histogram,
}

impl Counters {
    fn new() -> Self {
        metrics::describe_histogram!(
            "lastseen_publish_write_seconds",
            metrics::Unit::Seconds,
            "Time until the frames of a round of messages were written."
        );
        metrics::describe_histogram!(
            "lastseen_publish_confirm_seconds",
            metrics::Unit::Seconds,
            "Time from then until all of the round was confirmed."
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

    fn add(&self, tally: &Tally) {
        self.confirmed.increment(tally.confirmed);
        self.refused.increment(tally.refused);
        self.unroutable.increment(tally.unroutable);
        self.written.record(tally.waits.written);
        self.until_confirmed.record(tally.waits.confirmed);
    }
}
