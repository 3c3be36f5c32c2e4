//! Publishes messages to the queue.

use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::Histogram;
use runtime::Status;
use tokio::sync::watch;

use crate::queue::amqp;
use crate::queue::broker::{Backend, Broker};
use crate::queue::error::PublishError;
use crate::queue::origin::Origin;
use crate::queue::sqlite::{self, Queue};

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
    /// For RabbitMQ, starts the tokio task that opens the connection and reopens it whenever it is
    /// lost. The management page shows the connection as `name`.
    #[must_use]
    pub fn start(broker: Broker, name: &str) -> Self {
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
        let kind = match broker.backend {
            Backend::Amqp(access) => {
                let topology = amqp::Topology::new(&broker.queue);
                Kind::Amqp(amqp::Publisher::start(access, topology, name, &broker.supervisor))
            }
            Backend::Sqlite(queue) => Kind::Sqlite(queue),
        };
        Self { kind, latency: metrics::histogram!("lastseen_publish_seconds") }
    }

    /// Publishes one persistent message with this `origin` for each of `ids`, and waits until all
    /// are confirmed. On RabbitMQ, this does not wait for capacity: see [`PublishError::Full`].
    ///
    /// # Errors
    /// [`PublishError`], after `within` at the latest. None, some or all of the messages may then
    /// be in the queue.
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

    /// Whether the broker accepts messages now, for health checks. The status is also an error
    /// while the connection is open but a queue refuses all messages. To learn when to publish
    /// again, use [`Publisher::wait_until_open`].
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        match &self.kind {
            Kind::Amqp(publisher) => publisher.status(),
            Kind::Sqlite(queue) => queue.file.status(),
        }
    }

    /// Waits until there is a connection that the broker has not blocked, or until the file can be
    /// written. Returns at once if the publisher task has stopped.
    pub async fn wait_until_open(&self) {
        match &self.kind {
            Kind::Amqp(publisher) => publisher.wait_until_open().await,
            Kind::Sqlite(queue) => _ = queue.file.status().wait_for(Result::is_ok).await,
        }
    }

    /// Closes the connection or the file, if all other clones of the publisher and of its
    /// [`Broker`] have been dropped.
    pub async fn close(self) {
        match self.kind {
            Kind::Amqp(publisher) => publisher.close().await,
            Kind::Sqlite(queue) => queue.close().await,
        }
    }
}
