//! Publishes messages to the queue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use embedded::OpenError;
use metrics::Histogram;
use tokio::sync::watch;

use crate::config::{Backend, Config};
use crate::sqlite::{self, Queue};
use crate::{LinkStatus, Origin, amqp};

/// Why a batch was not confirmed. Some of its messages may be in the queue nevertheless.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PublishError {
    /// There is no usable connection, or the file cannot be written.
    #[error("the broker is away: {0}")]
    Away(String),
    /// The number of unconfirmed messages is at its limit: the broker confirms too slowly.
    #[error("{0} messages are unconfirmed already")]
    Full(usize),
    /// The broker did not confirm in time.
    #[error("the broker did not confirm within {0:?}")]
    Timeout(Duration),
    /// The broker refused messages (`basic.nack`), for example because a queue is full.
    #[error("the broker refused {} of the messages", positions.len())]
    Refused {
        /// The positions of the refused messages in the batch; all others are confirmed.
        positions: Vec<usize>,
    },
    /// The queue does not exist; the publisher declares it again.
    #[error("the queue does not exist")]
    Unroutable,
}

/// Publishes messages to the broker. It is cheap to clone; dropping the last clone closes the
/// connection.
#[derive(Clone)]
pub struct Publisher {
    pub(crate) kind: Kind,
    latency: Histogram,
}

// Decision: docs/decisions/0058-why-are-the-two-backends-enums.md
#[derive(Clone)]
pub(crate) enum Kind {
    Amqp(amqp::Publisher),
    Sqlite(Arc<Queue>),
}

impl Publisher {
    /// For RabbitMQ, starts the task that connects, and reconnects until it succeeds; the
    /// management page shows the connection as `name`. For a queue in a file, opens the file.
    ///
    /// # Errors
    /// [`OpenError`], only for a file.
    pub fn start(config: &Config, name: &str) -> Result<Self, OpenError> {
        metrics::describe_histogram!(
            "lastseen_publish_seconds",
            metrics::Unit::Seconds,
            "Time until a batch of messages was confirmed or failed."
        );
        metrics::describe_counter!(
            "lastseen_published_total",
            "Messages by the broker's response, including retries and dead letters."
        );
        for outcome in ["confirmed", "refused", "unroutable"] {
            metrics::counter!("lastseen_published_total", "outcome" => outcome).increment(0);
        }
        let kind = match &config.amqp_uri.0 {
            Backend::Amqp(uri) => {
                let access = config.access_with(uri);
                let config = amqp::Config { access, queue: config.queue.clone() };
                Kind::Amqp(amqp::Publisher::start(config, name))
            }
            Backend::Sqlite(location) => Kind::Sqlite(location.open(Queue::open)?),
        };
        Ok(Self { kind, latency: metrics::histogram!("lastseen_publish_seconds") })
    }

    /// Publishes one persistent message with this `origin` for each of `ids`, and waits until all
    /// are confirmed. On RabbitMQ, it does not wait for capacity: see [`PublishError::Full`].
    ///
    /// # Errors
    /// [`PublishError`], within `within`; none, some or all of the messages may be in the queue
    /// then.
    pub async fn publish_ids<'a>(
        &self,
        origin: impl Into<Origin<'a>>,
        ids: &[i64],
        within: Duration,
    ) -> Result<(), PublishError> {
        let origin = origin.into();
        if ids.is_empty() {
            return Ok(());
        }
        let started = Instant::now();
        let confirmed = match &self.kind {
            Kind::Amqp(publisher) => publisher.publish_ids(origin, ids, within).await,
            Kind::Sqlite(queue) => sqlite::publish(queue, origin, ids, within).await,
        };
        self.latency.record(started.elapsed());
        confirmed
    }

    /// Whether the broker accepts messages now, for health checks. It is an error while a queue
    /// refuses all messages, although the publisher may have a connection: see
    /// [`Publisher::wait_until_open`].
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        match &self.kind {
            Kind::Amqp(publisher) => publisher.status(),
            Kind::Sqlite(queue) => queue.status(),
        }
    }

    /// Waits until there is a connection that the broker has not blocked. Returns at once if the
    /// publisher task has died.
    pub async fn wait_until_open(&self) {
        match &self.kind {
            Kind::Amqp(publisher) => publisher.wait_until_open().await,
            Kind::Sqlite(queue) => _ = queue.status().wait_for(Result::is_ok).await,
        }
    }

    /// Returns only if the publisher task has died. The process must end then.
    pub async fn died(&self) {
        match &self.kind {
            Kind::Amqp(publisher) => publisher.died().await,
            Kind::Sqlite(queue) => queue.died().await,
        }
    }

    /// Closes the connection or the file, if all other clones have been dropped.
    pub async fn close(self) {
        match self.kind {
            Kind::Amqp(publisher) => publisher.close().await,
            Kind::Sqlite(queue) => queue.close().await,
        }
    }
}
