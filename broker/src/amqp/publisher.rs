//! Publishing with confirms, pipelined over all callers.
//!
//! Callers hand in batches; one task owns the connection and publishes them in rounds, each with
//! whatever has come in meanwhile, several rounds at a time.

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

use publisher_task::Driver;
use status_reporter::Standing;

// Decision: docs/decisions/0002-does-a-callback-wait-for-publisher-capacity.md
/// Messages that are waiting to be published or confirmed, over all callers; what RabbitMQ takes in a
/// fifth of a second when it is quick. With more of them, callbacks would wait for a confirm that comes too
/// late. At about 1 KiB each it also bounds the memory that a broker which stops confirming can make us
/// hold.
const MAX_OUTSTANDING: u32 = 10_000;
/// What one batch counts for at most, so that the largest callback leaves room for others, and does not
/// need all of it for itself. So a second large batch at the same time can exceed [`MAX_OUTSTANDING`].
const MAX_OUTSTANDING_PER_BATCH: u32 = MAX_OUTSTANDING / 2;

/// See [`crate::Publisher`].
#[derive(Clone)]
pub(crate) struct Publisher {
    /// Unbounded, because what it holds is bounded by `places`.
    batches: mpsc::UnboundedSender<Batch>,
    places: Arc<Semaphore>,
    /// Whether there is a session that batches can be handed to.
    open: watch::Receiver<LinkStatus>,
    status: watch::Receiver<LinkStatus>,
    config: Arc<Config>,
    topology: Arc<Topology>,
    expiry: Arc<ExpiryCheck>,
}

/// One message on its way out.
#[derive(Clone, Debug)]
pub(super) struct Outgoing {
    pub(super) body: Vec<u8>,
    pub(super) properties: BasicProperties,
}

/// What one caller wants to have published, all of it or an error.
struct Batch {
    /// The queue that all of them go to.
    queue: ShortString,
    messages: Vec<Outgoing>,
    reply: oneshot::Sender<Result<(), PublishError>>,
    /// Held until the batch is answered.
    _places: OwnedSemaphorePermit,
}

impl Publisher {
    pub(crate) fn start(config: Config, name: &str) -> Self {
        let (batches, incoming) = mpsc::unbounded_channel();
        let not_yet = || watch::channel(Err("not connected yet".to_owned()));
        let ((is_open, open), (is_sound, status)) = (not_yet(), not_yet());
        let standing = Standing::new(name, is_open, is_sound);
        let topology = Arc::new(Topology::new(&config));
        let config = Arc::new(config);
        let driver =
            Driver::new(Arc::clone(&config), Arc::clone(&topology), name, incoming, standing);
        tokio::spawn(driver.run());
        Self {
            batches,
            places: Arc::new(Semaphore::new(MAX_OUTSTANDING as usize)),
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
            properties = properties.with_headers(history::begun_by(traceparent));
        }
        let message =
            |id: &i64| Outgoing { body: message::encode(*id), properties: properties.clone() };
        let places = Arc::clone(&self.places).try_acquire_many_owned(places_for(ids.len()));
        let places = async {
            places.map_err(|error| match error {
                TryAcquireError::NoPermits => PublishError::Full(MAX_OUTSTANDING as usize),
                TryAcquireError::Closed => stopped(),
            })
        };
        self.publish_in(places, &self.topology.queue, ids.iter().map(message), within).await
    }

    /// Publishes `messages` to one queue, and waits until there is room for them.
    pub(super) async fn publish(
        &self,
        queue: &ShortString,
        messages: impl ExactSizeIterator<Item = Outgoing>,
        within: Duration,
    ) -> Result<(), PublishError> {
        let places = Arc::clone(&self.places).acquire_many_owned(places_for(messages.len()));
        let places = async { places.await.map_err(|_| stopped()) };
        self.publish_in(places, queue, messages, within).await
    }

    /// The messages are not built before there is room for them.
    async fn publish_in(
        &self,
        places: impl Future<Output = Result<OwnedSemaphorePermit, PublishError>>,
        queue: &ShortString,
        messages: impl ExactSizeIterator<Item = Outgoing>,
        within: Duration,
    ) -> Result<(), PublishError> {
        if let Err(reason) = &*self.open.borrow() {
            return Err(PublishError::Away(reason.clone()));
        }
        let confirmed = async {
            let places = places.await?;
            let (reply, answer) = oneshot::channel();
            let messages = messages.collect();
            let batch = Batch { queue: queue.clone(), messages, reply, _places: places };
            self.batches.send(batch).map_err(|_| stopped())?;
            // Its round ended with the connection.
            answer
                .await
                .unwrap_or_else(|_| Err(PublishError::Away("the connection was lost".to_owned())))
        };
        timeout(within, confirmed).await.unwrap_or(Err(PublishError::Timeout(within)))
    }

    pub(crate) fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.clone()
    }

    /// Returns at once if the publisher has died.
    pub(crate) async fn opened(&self) {
        let _ = self.open.clone().wait_for(Result::is_ok).await;
    }

    pub(crate) async fn died(&self) {
        self.batches.closed().await;
    }

    /// Waits until it is said, or a while for other clones that are not dropped.
    pub(crate) async fn close(self) {
        let Self { batches, mut status, .. } = self;
        drop(batches);
        let ended = async { while status.changed().await.is_ok() {} };
        if timeout(RPC_TIMEOUT, ended).await.is_err() {
            tracing::debug!("the publisher is still in use, or the broker does not answer");
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

fn places_for(messages: usize) -> u32 {
    u32::try_from(messages).unwrap_or(u32::MAX).min(MAX_OUTSTANDING_PER_BATCH)
}

fn stopped() -> PublishError {
    PublishError::Away("the publisher has stopped".to_owned())
}

#[cfg(test)]
mod tests;
