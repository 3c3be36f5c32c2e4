//! Publishes messages with confirms, pipelined across all callers.
//!
//! Callers submit batches. One task owns the connection and publishes all waiting batches together
//! as a round, several rounds at a time.

mod publisher_task;
mod refusals;
mod round;
mod status_reporter;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lapin::BasicProperties;
use lapin::types::ShortString;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, mpsc, oneshot, watch};
use tokio::time::timeout;

use super::Config;
use super::expiry_check::ExpiryCheck;
use super::history;
use super::link::RPC_TIMEOUT;
use super::topology::Topology;
use crate::{LinkStatus, Origin, PublishError, message};

use publisher_task::PublisherTask;
use status_reporter::StatusReporter;

// Decision: docs/decisions/0002-does-a-callback-wait-for-publisher-capacity.md
/// Messages of all callers that wait to be published or confirmed: what a fast RabbitMQ confirms in
/// a fifth of a second. With more, callbacks would wait for confirms that arrive too late. At about
/// 1 KiB each, this also bounds the memory if the broker stops confirming.
const MAX_OUTSTANDING: u32 = 10_000;
/// The most permits that one batch takes, so that the largest callback leaves some for others and
/// does not need all of them. Two large batches together can therefore exceed [`MAX_OUTSTANDING`]
/// messages.
const MAX_OUTSTANDING_PER_BATCH: u32 = MAX_OUTSTANDING / 2;

/// See [`crate::Publisher`].
#[derive(Clone)]
pub(crate) struct Publisher {
    /// Unbounded, because `permits` bounds its content.
    batches: mpsc::UnboundedSender<Batch>,
    permits: Arc<Semaphore>,
    /// Whether there is a session that accepts batches.
    open: watch::Receiver<LinkStatus>,
    status: watch::Receiver<LinkStatus>,
    config: Arc<Config>,
    topology: Arc<Topology>,
    expiry: Arc<ExpiryCheck>,
}

/// A message to publish.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    pub(super) body: Vec<u8>,
    pub(super) properties: BasicProperties,
}

/// The messages of one caller, which are all confirmed or answered with an error.
struct Batch {
    /// The queue of all messages.
    queue: ShortString,
    messages: Vec<Outgoing>,
    reply: oneshot::Sender<Result<(), PublishError>>,
    /// Held until the batch is answered.
    _permits: OwnedSemaphorePermit,
}

impl Publisher {
    pub(crate) fn start(config: Config, name: &str) -> Self {
        let (batches, incoming) = mpsc::unbounded_channel();
        let not_connected = || watch::channel(Err("not connected yet".to_owned()));
        let ((open_sender, open), (status_sender, status)) = (not_connected(), not_connected());
        let reporter = StatusReporter::new(name, open_sender, status_sender);
        let topology = Arc::new(Topology::new(&config));
        let config = Arc::new(config);
        let task = PublisherTask::new(
            Arc::clone(&config),
            Arc::clone(&topology),
            name,
            incoming,
            reporter,
        );
        tokio::spawn(task.run());
        Self {
            batches,
            permits: Arc::new(Semaphore::new(MAX_OUTSTANDING as usize)),
            open,
            status,
            config,
            topology,
            expiry: Arc::default(),
        }
    }

    pub(crate) async fn publish_ids(
        &self,
        origin: Origin<'_>,
        ids: &[i64],
        within: Duration,
    ) -> Result<(), PublishError> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_correlation_id(origin.callback_id.into())
            .with_timestamp(seconds);
        if let Some(traceparent) = origin.traceparent {
            properties = properties.with_headers(history::with_traceparent(traceparent));
        }
        let message =
            |id: &i64| Outgoing { body: message::encode(*id), properties: properties.clone() };
        let permits = Arc::clone(&self.permits).try_acquire_many_owned(permits_for(ids.len()));
        let permits = async {
            permits.map_err(|error| match error {
                TryAcquireError::NoPermits => PublishError::Full(MAX_OUTSTANDING as usize),
                TryAcquireError::Closed => stopped(),
            })
        };
        self.publish_with(permits, &self.topology.queue, ids.iter().map(message), within).await
    }

    /// Publishes `messages` to one queue, after waiting for permits.
    pub(super) async fn publish(
        &self,
        queue: &ShortString,
        messages: impl ExactSizeIterator<Item = Outgoing>,
        within: Duration,
    ) -> Result<(), PublishError> {
        let permits = Arc::clone(&self.permits).acquire_many_owned(permits_for(messages.len()));
        let permits = async { permits.await.map_err(|_| stopped()) };
        self.publish_with(permits, queue, messages, within).await
    }

    /// Publishes `messages` to one queue. It encodes them only after it has the permits.
    async fn publish_with(
        &self,
        permits: impl Future<Output = Result<OwnedSemaphorePermit, PublishError>>,
        queue: &ShortString,
        messages: impl ExactSizeIterator<Item = Outgoing>,
        within: Duration,
    ) -> Result<(), PublishError> {
        if let Err(reason) = &*self.open.borrow() {
            return Err(PublishError::Away(reason.clone()));
        }
        let confirmed = async {
            let permits = permits.await?;
            let (reply, outcome) = oneshot::channel();
            let messages = messages.collect();
            let batch = Batch { queue: queue.clone(), messages, reply, _permits: permits };
            self.batches.send(batch).map_err(|_| stopped())?;
            // Without an answer, the batch was lost with the connection.
            outcome
                .await
                .unwrap_or_else(|_| Err(PublishError::Away("the connection was lost".to_owned())))
        };
        timeout(within, confirmed).await.unwrap_or(Err(PublishError::Timeout(within)))
    }

    pub(crate) fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.clone()
    }

    /// Returns at once if the publisher task has died.
    pub(crate) async fn wait_until_open(&self) {
        let _ = self.open.clone().wait_for(Result::is_ok).await;
    }

    pub(crate) async fn died(&self) {
        self.batches.closed().await;
    }

    /// Waits until the connection is closed, or until the timeout if other clones are not dropped.
    pub(crate) async fn close(self) {
        let Self { batches, mut status, .. } = self;
        drop(batches);
        let ended = async { while status.changed().await.is_ok() {} };
        if timeout(RPC_TIMEOUT, ended).await.is_err() {
            tracing::debug!(
                "the publisher was not closed in time: it is in use, or the broker does not respond"
            );
        }
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn expiry(&self) -> &Arc<ExpiryCheck> {
        &self.expiry
    }

    pub(super) fn topology(&self) -> &Topology {
        &self.topology
    }
}

fn permits_for(messages: usize) -> u32 {
    u32::try_from(messages).unwrap_or(u32::MAX).min(MAX_OUTSTANDING_PER_BATCH)
}

fn stopped() -> PublishError {
    PublishError::Away("the publisher has stopped".to_owned())
}

#[cfg(test)]
mod tests;
