//! Publishing with confirms, pipelined over all callers.
//!
//! Callers hand in batches; one task owns the connection and publishes them in rounds, each with
//! whatever has come in meanwhile, several rounds at a time.

mod driver;
mod round;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lapin::BasicProperties;
use lapin::types::ShortString;
use metrics::Histogram;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::LinkStatus;
use crate::config::Config;
use crate::link::RPC_TIMEOUT;
use crate::message;
use crate::topology::Topology;

use driver::Driver;

/// Messages that are waiting to be published or confirmed, over all callers; beyond it callers wait,
/// and their deadlines run. At about 1 KiB each it bounds the memory that a broker which stops
/// confirming can make us hold. A larger batch is taken when nothing else is there.
const MAX_OUTSTANDING: u32 = 20_000;

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
    /// Unbounded, because what it holds is bounded by `places`.
    batches: mpsc::UnboundedSender<Batch>,
    places: Arc<Semaphore>,
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

/// What one caller wants to have published, all of it or an error.
struct Batch {
    messages: Vec<Outgoing>,
    reply: oneshot::Sender<Result<(), PublishError>>,
    /// Held until the batch is answered.
    _places: OwnedSemaphorePermit,
}

impl Publisher {
    /// Starts the task that connects, and reconnects for as long as it takes. The management page
    /// shows the connection as `name`.
    #[must_use]
    pub fn start(config: &Config, name: &str) -> Self {
        metrics::describe_histogram!(
            "lastseen_publish_seconds",
            metrics::Unit::Seconds,
            "Time from a batch of messages to its last confirm, or to its failure."
        );
        let (batches, incoming) = mpsc::unbounded_channel();
        let (status, watched) = watch::channel(Err("not connected yet".to_owned()));
        let topology = Arc::new(Topology::new(config));
        let driver = Driver::new(config.clone(), Arc::clone(&topology), name, incoming, status);
        tokio::spawn(driver.run());
        Self {
            batches,
            places: Arc::new(Semaphore::new(MAX_OUTSTANDING as usize)),
            status: watched,
            topology,
            latency: metrics::histogram!("lastseen_publish_seconds"),
        }
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
        self.publish(ids.iter().map(message), within).await
    }

    /// Publishes `messages`, which are not built before there is room for them.
    pub(crate) async fn publish(
        &self,
        messages: impl ExactSizeIterator<Item = Outgoing>,
        within: Duration,
    ) -> Result<(), PublishError> {
        if messages.len() == 0 {
            return Ok(());
        }
        if let Err(reason) = &*self.status.borrow() {
            return Err(PublishError::Away(reason.clone()));
        }
        let started = Instant::now();
        let stopped = || PublishError::Away("the publisher has stopped".to_owned());
        let confirmed = async {
            let wanted = u32::try_from(messages.len()).unwrap_or(u32::MAX).min(MAX_OUTSTANDING);
            let places = Arc::clone(&self.places).acquire_many_owned(wanted).await;
            let places = places.map_err(|_| stopped())?;
            let (reply, answer) = oneshot::channel();
            let batch = Batch { messages: messages.collect(), reply, _places: places };
            self.batches.send(batch).map_err(|_| stopped())?;
            // Its round ended with the connection.
            answer
                .await
                .unwrap_or_else(|_| Err(PublishError::Away("the connection was lost".to_owned())))
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

#[cfg(test)]
mod tests;
