//! Publishing with confirms, pipelined over all callers.
//!
//! One task owns the connection and its channel. Callers send it batches; it polls all publishes
//! together, so that frames of many callers share a write, and answers each batch once the broker
//! has confirmed the whole of it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation, Connection, Event};
use metrics::{Counter, Histogram};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::LinkStatus;
use crate::config::Config;
use crate::link::{self, LinkError, OutageLog, RPC_TIMEOUT};
use crate::message;
use crate::topology::Topology;

/// Batches that wait for their turn; beyond it callers wait, and their deadlines run.
const WAITING_BATCHES: usize = 1_024;
/// Unconfirmed messages on the channel above which no further batch is begun. At about 1 KiB each it
/// bounds the memory that a broker which stops confirming can make us hold.
const MAX_UNCONFIRMED: usize = 20_000;
/// With publishes outstanding and not one confirm for so long, the connection is given up, even if
/// its heartbeats go on.
const STALL: Duration = Duration::from_secs(10);
const PERSISTENT: u8 = 2;

/// Why a batch is not known to be durable. Some of its messages may be in the queue all the same.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PublishError {
    /// There is no usable connection.
    #[error("the broker is away: {0}")]
    Away(String),
    /// The broker did not confirm in time.
    #[error("the broker did not confirm within {0:?}")]
    Timeout(Duration),
    /// The broker refused a message (`basic.nack`), as it does when a queue is full.
    #[error("the broker refused a message")]
    Refused,
    /// The queue is gone; it is being declared again.
    #[error("the queue does not exist")]
    Unroutable,
}

/// Publishes to the broker; cheap to clone. The connection closes when the last clone is dropped.
#[derive(Clone)]
pub struct Publisher {
    batches: mpsc::Sender<Batch>,
    status: watch::Receiver<LinkStatus>,
    topology: Arc<Topology>,
    latency: Histogram,
}

/// One message on its way out.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    pub(crate) routing_key: ShortString,
    pub(crate) body: Vec<u8>,
    pub(crate) properties: BasicProperties,
}

struct Batch {
    messages: Vec<Outgoing>,
    reply: oneshot::Sender<Result<(), PublishError>>,
}

impl Publisher {
    /// Starts the task that connects, and reconnects for as long as it takes. The management page
    /// shows the connection as `name`.
    #[must_use]
    pub fn start(config: &Config, name: &str) -> Self {
        describe_metrics();
        let (batches, incoming) = mpsc::channel(WAITING_BATCHES);
        let (status, watched) = watch::channel(Err("not connected yet".to_owned()));
        let topology = Arc::new(Topology::new(config));
        let driver = Driver {
            config: config.clone(),
            topology: Arc::clone(&topology),
            name: name.to_owned(),
            batches: incoming,
            status,
            counters: Counters::new(),
        };
        tokio::spawn(driver.run());
        let latency = metrics::histogram!("lastseen_publish_seconds");
        Self { batches, status: watched, topology, latency }
    }

    /// Publishes one persistent message for each of `ids` and waits until all are confirmed.
    /// `callback_id` travels along as the messages' correlation id.
    ///
    /// # Errors
    /// [`PublishError`], at the latest after `within`; then none, some or all are in the queue.
    pub async fn publish_ids(
        &self,
        callback_id: &str,
        ids: &[i64],
        within: Duration,
    ) -> Result<(), PublishError> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_correlation_id(callback_id.into())
            .with_timestamp(seconds);
        let message = |id: &i64| Outgoing {
            routing_key: self.topology.queue.clone(),
            body: message::encode(*id),
            properties: properties.clone(),
        };
        self.publish(ids.iter().map(message).collect(), within).await
    }

    pub(crate) async fn publish(
        &self,
        messages: Vec<Outgoing>,
        within: Duration,
    ) -> Result<(), PublishError> {
        if messages.is_empty() {
            return Ok(());
        }
        if let Err(reason) = &*self.status.borrow() {
            return Err(PublishError::Away(reason.clone()));
        }
        let started = Instant::now();
        let stopped = || PublishError::Away("the publisher has stopped".to_owned());
        let confirmed = async {
            let (reply, answer) = oneshot::channel();
            self.batches.send(Batch { messages, reply }).await.map_err(|_| stopped())?;
            answer.await.unwrap_or_else(|_| Err(stopped()))
        };
        let result = timeout(within, confirmed).await.unwrap_or(Err(PublishError::Timeout(within)));
        self.latency.record(started.elapsed());
        result
    }

    /// Whether the broker takes messages right now.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.clone()
    }

    /// Returns only if the publishing task has died; a service must not outlive it.
    pub async fn died(&self) {
        self.batches.closed().await;
    }

    /// Says goodbye to the broker, once every other clone is dropped too, and waits until it is said.
    pub async fn close(self) {
        let Self { batches, mut status, .. } = self;
        drop(batches);
        let ended = async { while status.changed().await.is_ok() {} };
        if timeout(RPC_TIMEOUT, ended).await.is_err() {
            tracing::debug!("the publisher is still in use, or the broker does not answer");
        }
    }

    pub(crate) fn topology(&self) -> &Topology {
        &self.topology
    }
}

struct Counters {
    confirmed: Counter,
    refused: Counter,
    unroutable: Counter,
}

impl Counters {
    fn new() -> Self {
        let outcome = |outcome| metrics::counter!("lastseen_published_total", "outcome" => outcome);
        Self {
            confirmed: outcome("confirmed"),
            refused: outcome("refused"),
            unroutable: outcome("unroutable"),
        }
    }
}

fn describe_metrics() {
    metrics::describe_counter!(
        "lastseen_published_total",
        "Messages by the broker's verdict; retries and dead letters included."
    );
    metrics::describe_histogram!(
        "lastseen_publish_seconds",
        metrics::Unit::Seconds,
        "Time from a batch of messages to its last confirm, or to its failure."
    );
}

/// The task behind a [`Publisher`].
struct Driver {
    config: Config,
    topology: Arc<Topology>,
    name: String,
    batches: mpsc::Receiver<Batch>,
    status: watch::Sender<LinkStatus>,
    counters: Counters,
}

struct Session {
    connection: Connection,
    channel: Channel,
}

/// Why a session is over.
enum Ended {
    /// Every publisher is gone and all is confirmed.
    Finished,
    Lost(String),
}

impl Driver {
    async fn run(mut self) {
        let mut outage = OutageLog::default();
        let mut waits = link::backoff();
        let mut wait = Duration::ZERO;
        loop {
            let opened = async {
                tokio::time::sleep(wait).await;
                open(&self.config, &self.topology, &self.name).await
            };
            let reason = match refusing(&mut self.batches, &self.status, opened).await {
                None => return,
                Some(Err(error)) => error.to_string(),
                Some(Ok(session)) => {
                    outage.up(&self.name);
                    _ = self.status.send_replace(Ok(()));
                    let connected_at = Instant::now();
                    match self.serve(&session).await {
                        Ended::Finished => {
                            close(&session.connection).await;
                            return;
                        }
                        Ended::Lost(reason) => {
                            // A link that breaks again and again is not hammered either.
                            if connected_at.elapsed() > Duration::from_secs(5) {
                                waits = link::backoff();
                            }
                            reason
                        }
                    }
                }
            };
            outage.down(&self.name, &reason);
            _ = self.status.send_replace(Err(reason));
            wait = waits.next().unwrap_or(wait);
        }
    }

    /// Publishes batches until the connection is lost or nobody is left to publish for.
    async fn serve(&mut self, Session { connection, channel }: &Session) -> Ended {
        let mut unconfirmed = FuturesUnordered::new();
        let mut batches = Batches::default();
        let mut returned = HashSet::new();
        let mut sequence = 0_u64;
        let mut events = std::pin::pin!(connection.events_listener());
        let mut pulse = tokio::time::interval(Duration::from_secs(1));
        let mut last_confirm = Instant::now();
        let mut finishing = false;
        let reason = loop {
            tokio::select! {
                batch = self.batches.recv(), if unconfirmed.len() < MAX_UNCONFIRMED && !finishing => {
                    let Some(Batch { messages, reply }) = batch else {
                        finishing = true;
                        if unconfirmed.is_empty() { return Ended::Finished; }
                        continue;
                    };
                    // The caller has gone: its deadline is over and it has answered for itself.
                    if reply.is_closed() { continue; }
                    if unconfirmed.is_empty() { last_confirm = Instant::now(); }
                    let batch = batches.begin(messages.len(), reply);
                    for message in messages {
                        sequence += 1;
                        unconfirmed.push(publish_one(channel, batch, sequence, message));
                    }
                }
                Some((batch, sequence, confirmation)) = unconfirmed.next() => {
                    last_confirm = Instant::now();
                    match verdict(sequence, confirmation, &mut returned) {
                        Verdict::Confirmed => {
                            self.counters.confirmed.increment(1);
                            batches.confirm(batch);
                        }
                        Verdict::Refused => {
                            self.counters.refused.increment(1);
                            batches.fail(batch, PublishError::Refused);
                        }
                        Verdict::Unroutable => {
                            self.counters.unroutable.increment(1);
                            batches.fail(batch, PublishError::Unroutable);
                            // The next session declares it, and not this one at once: a quorum queue
                            // that is back before its consumers' channels have noticed keeps them,
                            // but they take its first messages for ones that they had before and
                            // drop them, unacked until the connection ends (seen with 3.10).
                            break "the queue is gone; declaring it again".to_owned();
                        }
                        Verdict::Broken(reason) => break reason,
                    }
                    if finishing && unconfirmed.is_empty() { return Ended::Finished; }
                }
                Some(event) = events.next() => match event {
                    Event::Error(error) => break error.to_string(),
                    // The broker is short of memory or disk: it takes nothing until that is over,
                    // but the connection is sound.
                    Event::ConnectionBlocked(reason) => {
                        tracing::warn!(reason, "the broker takes no messages for now");
                        _ = self.status.send_replace(Err(format!("blocked: {reason}")));
                    }
                    Event::ConnectionUnblocked => {
                        tracing::info!("the broker takes messages again");
                        _ = self.status.send_replace(Ok(()));
                    }
                    _ => {}
                },
                _ = pulse.tick() => {
                    if !connection.status().connected() || !channel.status().connected() {
                        break "the connection is closed".to_owned();
                    }
                    let blocked = connection.status().blocked();
                    if !blocked && !unconfirmed.is_empty() && last_confirm.elapsed() > STALL {
                        break format!("not one confirm in {STALL:?}");
                    }
                }
            }
        };
        batches.fail_all(&PublishError::Away(reason.clone()));
        Ended::Lost(reason)
    }
}

/// Opens a session: the connection, the queues, and a channel that confirms.
async fn open(config: &Config, topology: &Topology, name: &str) -> Result<Session, LinkError> {
    let connection = link::connect(&config.amqp_uri, name).await?;
    timeout(RPC_TIMEOUT, topology.declare(&connection)).await??;
    let channel = timeout(RPC_TIMEOUT, async {
        let channel = connection.create_channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok(channel)
    });
    let channel = channel.await?.map_err(LinkError::OpenChannel)?;
    Ok(Session { connection, channel })
}

/// Says goodbye, so that the broker logs no abrupt end.
pub(crate) async fn close(connection: &Connection) {
    if timeout(RPC_TIMEOUT, connection.close(200, "done".into())).await.is_err() {
        tracing::debug!("the broker did not answer the close");
    }
}

/// Awaits `opening` while it turns away every batch, so that nobody waits for a broker that is not
/// there. `None` when every publisher is gone.
async fn refusing<T>(
    batches: &mut mpsc::Receiver<Batch>,
    status: &watch::Sender<LinkStatus>,
    opening: impl Future<Output = T>,
) -> Option<T> {
    let mut opening = std::pin::pin!(opening);
    loop {
        tokio::select! {
            opened = &mut opening => return Some(opened),
            batch = batches.recv() => {
                let reason = status.borrow().clone().err().unwrap_or_default();
                // A caller that has gone needs no answer.
                let _ = batch?.reply.send(Err(PublishError::Away(reason)));
            }
        }
    }
}

async fn publish_one(
    channel: &Channel,
    batch: u64,
    sequence: u64,
    message: Outgoing,
) -> (u64, u64, lapin::Result<Confirmation>) {
    let Outgoing { routing_key, body, properties } = message;
    let properties =
        properties.with_delivery_mode(PERSISTENT).with_message_id(sequence.to_string().into());
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let confirmation = async {
        let written = channel.basic_publish("".into(), routing_key, mandatory, &body, properties);
        written.await?.await
    };
    (batch, sequence, confirmation.await)
}

#[derive(Debug, PartialEq)]
enum Verdict {
    Confirmed,
    Refused,
    Unroutable,
    Broken(String),
}

/// What became of the publish `sequence`.
///
/// lapin attaches a returned message to whichever publish is confirmed next, so it is told by its
/// own message id and remembered in `returned`. That is sound because of three orders: the broker
/// sends the return before the confirm of the same message, lapin attaches it to the first confirm
/// after it, and `FuturesUnordered` yields in the order in which the confirms woke it. So by the
/// time the returned message's own confirm is seen here, its return has been.
fn verdict(
    sequence: u64,
    confirmation: lapin::Result<Confirmation>,
    returned: &mut HashSet<u64>,
) -> Verdict {
    let (acked, message) = match confirmation {
        Ok(Confirmation::Ack(message)) => (true, message),
        Ok(Confirmation::Nack(message)) => (false, message),
        Ok(Confirmation::NotRequested) => {
            return Verdict::Broken("the channel does not confirm".to_owned());
        }
        Err(error) => return Verdict::Broken(error.to_string()),
    };
    if let Some(message) = message {
        let id = message.delivery.properties.message_id().as_ref();
        match id.and_then(|id| id.as_str().parse().ok()) {
            Some(id) => _ = returned.insert(id),
            None => return Verdict::Broken("a message came back without its id".to_owned()),
        }
    }
    match (returned.remove(&sequence), acked) {
        (true, _) => Verdict::Unroutable,
        (false, true) => Verdict::Confirmed,
        (false, false) => Verdict::Refused,
    }
}

/// The batches that have messages outstanding.
#[derive(Default)]
struct Batches {
    next: u64,
    pending: HashMap<u64, Pending>,
}

struct Pending {
    outstanding: usize,
    reply: oneshot::Sender<Result<(), PublishError>>,
}

impl Batches {
    fn begin(
        &mut self,
        outstanding: usize,
        reply: oneshot::Sender<Result<(), PublishError>>,
    ) -> u64 {
        self.next += 1;
        self.pending.insert(self.next, Pending { outstanding, reply });
        self.next
    }

    /// One more message of the batch is durable; with the last one, the caller hears of it.
    fn confirm(&mut self, batch: u64) {
        // A batch that has failed is no longer there.
        let Some(pending) = self.pending.get_mut(&batch) else { return };
        pending.outstanding -= 1;
        if pending.outstanding == 0 {
            self.answer(batch, Ok(()));
        }
    }

    fn fail(&mut self, batch: u64, error: PublishError) {
        self.answer(batch, Err(error));
    }

    fn fail_all(&mut self, error: &PublishError) {
        for (_, pending) in self.pending.drain() {
            let _ = pending.reply.send(Err(error.clone()));
        }
    }

    fn answer(&mut self, batch: u64, answer: Result<(), PublishError>) {
        // A batch fails once, with the first of its messages that does.
        if let Some(pending) = self.pending.remove(&batch) {
            // A caller whose deadline is over has gone.
            let _ = pending.reply.send(answer);
        }
    }
}

#[cfg(test)]
mod tests;
