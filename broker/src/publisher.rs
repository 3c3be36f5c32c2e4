//! Making callbacks durable.

use std::sync::Arc;
use std::time::{Duration, Instant};

use embedded::OpenError;
use metrics::Histogram;
use tokio::sync::watch;

use crate::config::{Backend, Config};
use crate::sqlite::{self, Queue};
use crate::{LinkStatus, Origin, amqp};

/// Why a batch is not known to be durable. Some of its messages may be in the queue all the same.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PublishError {
    /// There is no usable connection, or the file cannot be written.
    #[error("the broker is away: {0}")]
    Away(String),
    /// The broker has as many messages to confirm as it may have: it is given more than it takes.
    #[error("the broker has {0} messages to confirm already")]
    Full(usize),
    /// The broker did not confirm in time.
    #[error("the broker did not confirm within {0:?}")]
    Timeout(Duration),
    /// The broker refused messages (`basic.nack`), as it does when a queue is full.
    #[error("the broker refused {} of the messages", which.len())]
    Refused {
        /// Their positions in the batch; all others are confirmed.
        which: Vec<usize>,
    },
    /// The queue is gone; it is being declared again.
    #[error("the queue does not exist")]
    Unroutable,
}

/// Publishes to the broker; cheap to clone. The connection closes when the last clone is dropped.
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
    /// Starts the task that connects to RabbitMQ, whose management page shows the connection as
    /// `name`, and reconnects for as long as it takes; or opens the file.
    ///
    /// # Errors
    /// [`OpenError`], of a file only.
    pub fn start(config: &Config, name: &str) -> Result<Self, OpenError> {
        metrics::describe_histogram!(
            "lastseen_publish_seconds",
            metrics::Unit::Seconds,
            "Time from a batch of messages to its last confirm, or to its failure."
        );
        metrics::describe_counter!(
            "lastseen_published_total",
            "Messages by the broker's verdict; retries and dead letters included."
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

    /// Publishes one persistent message for each of `ids` and waits until all are confirmed.
    /// `origin` travels along; a callback's id alone will do. On RabbitMQ it does not wait until there is room for them.
    ///
    /// # Errors
    /// [`PublishError`], at the latest after `within`; then none, some or all are in the queue.
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

    /// Whether the broker takes messages right now, for health checks. While a queue refuses everything it is
    /// an error, although messages can be handed over to be tried: see [`Publisher::opened`].
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        match &self.kind {
            Kind::Amqp(publisher) => publisher.status(),
            Kind::Sqlite(queue) => queue.status(),
        }
    }

    /// Returns once messages can be handed over: there is a connection, and the broker has not blocked it. If
    /// what publishes has died, it returns at once.
    pub async fn opened(&self) {
        match &self.kind {
            Kind::Amqp(publisher) => publisher.opened().await,
            Kind::Sqlite(queue) => _ = queue.status().wait_for(Result::is_ok).await,
        }
    }

    /// Returns only if what publishes has died; a service must not outlive it.
    pub async fn died(&self) {
        match &self.kind {
            Kind::Amqp(publisher) => publisher.died().await,
            Kind::Sqlite(queue) => queue.died().await,
        }
    }

    /// Says goodbye to the broker, or closes the file, once every other clone is dropped too.
    pub async fn close(self) {
        match self.kind {
            Kind::Amqp(publisher) => publisher.close().await,
            Kind::Sqlite(queue) => queue.close().await,
        }
    }
}
