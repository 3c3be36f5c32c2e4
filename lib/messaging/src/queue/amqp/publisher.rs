//! Publishes messages with confirms, pipelined across all callers.
//!
//! Callers submit batches. One tokio task owns the connection and publishes all waiting batches
//! together as a round. Several rounds run at the same time.

mod publisher_task;
mod refusals;
mod round;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lapin::BasicProperties;
use runtime::{Needed, Status, Supervisor};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, mpsc, oneshot, watch};
use tokio::time::timeout;

use super::expiry_check::ExpiryCheck;
use super::history;
use super::topology::Topology;
use crate::amqp::{Access, RPC_TIMEOUT, Reconnector};
use crate::queue::error::PublishError;
use crate::queue::message;
use crate::queue::origin::Origin;

use publisher_task::PublisherTask;
use round::Batch;
pub(super) use round::Outgoing;

// Decision: docs/decisions/0002-does-a-callback-wait-for-publisher-capacity.md
/// The most messages of all callers that wait to be published or confirmed. A fast RabbitMQ
/// confirms this many in a fifth of a second; with more, callbacks would wait for confirms that
/// arrive too late. At about 1 KiB for each message, the limit also bounds the memory if the broker
/// stops confirming.
const MAX_OUTSTANDING: u32 = 10_000;
/// The most permits that one batch takes, so that the largest callback neither waits for all
/// permits nor takes all of them. Two large batches together can therefore exceed
/// [`MAX_OUTSTANDING`] messages.
const MAX_OUTSTANDING_PER_BATCH: u32 = MAX_OUTSTANDING / 2;

/// See [`crate::queue::Publisher`].
#[derive(Clone)]
pub(crate) struct Publisher {
    // Declared before `batches`, and so dropped first: without `batches`, the publisher task ends.
    needed: Needed,
    /// Unbounded, because `permits` bounds its content.
    batches: mpsc::UnboundedSender<Batch>,
    permits: Arc<Semaphore>,
    /// Whether there is a session that accepts batches.
    is_open: watch::Receiver<bool>,
    /// Whether the broker accepts messages, for health checks.
    status: watch::Receiver<Status>,
    pub(super) access: Arc<Access>,
    pub(super) topology: Arc<Topology>,
    pub(super) expiry: Arc<ExpiryCheck>,
}

impl Publisher {
    pub(crate) fn start(
        access: Access,
        topology: Topology,
        name: &str,
        supervisor: &Supervisor,
    ) -> Self {
        let (batches, incoming) = mpsc::unbounded_channel();
        let reconnector = Reconnector::new(access.clone(), name);
        let (is_open, status) = (reconnector.is_open(), reconnector.status());
        let topology = Arc::new(topology);
        let task = PublisherTask::new(Arc::clone(&topology), incoming, reconnector);
        let task = supervisor.spawn_critical(format!("publisher ({name})"), task.run());
        Self {
            needed: task.detach(),
            batches,
            permits: Arc::new(Semaphore::new(MAX_OUTSTANDING as usize)),
            is_open,
            status,
            access: Arc::new(access),
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
        let message = |id: &i64| Outgoing {
            queue: self.topology.queue_of(*id).clone(),
            body: message::encode(*id),
            properties: properties.clone(),
        };
        let permits = Arc::clone(&self.permits).try_acquire_many_owned(permits_for(ids.len()));
        let permits = async {
            permits.map_err(|error| match error {
                TryAcquireError::NoPermits => PublishError::Full(MAX_OUTSTANDING as usize),
                TryAcquireError::Closed => stopped(),
            })
        };
        self.publish_with(permits, ids.iter().map(message), within).await
    }

    /// Publishes `messages` after waiting for permits.
    pub(super) async fn publish(
        &self,
        messages: impl ExactSizeIterator<Item = Outgoing>,
        within: Duration,
    ) -> Result<(), PublishError> {
        let permits = Arc::clone(&self.permits).acquire_many_owned(permits_for(messages.len()));
        let permits = async { permits.await.map_err(|_| stopped()) };
        self.publish_with(permits, messages, within).await
    }

    /// Publishes `messages`. Encodes them only after it has the permits.
    async fn publish_with(
        &self,
        permits: impl Future<Output = Result<OwnedSemaphorePermit, PublishError>>,
        messages: impl ExactSizeIterator<Item = Outgoing>,
        within: Duration,
    ) -> Result<(), PublishError> {
        // Without a session, the status is an error, unless a session has just been opened.
        if !*self.is_open.borrow()
            && let Err(reason) = &*self.status.borrow()
        {
            return Err(PublishError::Away(reason.clone()));
        }
        let confirmed = async {
            let permits = permits.await?;
            let (reply, outcome) = oneshot::channel();
            let messages = messages.collect();
            let batch = Batch { messages, reply, _permits: permits };
            self.batches.send(batch).map_err(|_| stopped())?;
            // If the publisher task drops `reply`, the batch was lost with the connection.
            outcome
                .await
                .unwrap_or_else(|_| Err(PublishError::Away("the connection was lost".to_owned())))
        };
        timeout(within, confirmed).await.unwrap_or(Err(PublishError::Timeout(within)))
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Returns at once if the publisher task has stopped.
    pub(crate) async fn wait_until_open(&self) {
        let _ = self.is_open.clone().wait_for(|is_open| *is_open).await;
    }

    /// Waits until the connection is closed, or until the timeout if other clones are not dropped.
    pub(crate) async fn close(self) {
        let Self { needed, batches, mut status, .. } = self;
        drop(needed);
        drop(batches);
        let ended = async { while status.changed().await.is_ok() {} };
        if timeout(RPC_TIMEOUT, ended).await.is_err() {
            tracing::debug!(
                "the publisher was not closed in time: it is in use, or the broker does not respond"
            );
        }
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
