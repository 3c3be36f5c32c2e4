//! The broker, opened for the roles of a process.

use std::sync::Arc;

use runtime::{Status, Supervisor};
use sqlite_file::OpenError;
use tokio::sync::watch;

use crate::amqp::{Access, BrokerUrl};
use crate::queue::config::{Config, QueueConfig};
use crate::queue::sqlite::{FORMAT, Queue};

/// RabbitMQ, which may be away, or the open file of a queue. Clones share the file. It is closed
/// when all clones, and all of their publishers and consumers, are dropped.
#[derive(Clone)]
pub struct Broker {
    pub(crate) backend: Backend,
    pub(crate) queue: QueueConfig,
    pub(crate) supervisor: Supervisor,
}

#[derive(Clone)]
pub(crate) enum Backend {
    Amqp(Access),
    Sqlite(Arc<Queue>),
}

/// The queue, as it is named in traces.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The messaging system: `rabbitmq` or `sqlite`.
    pub system: &'static str,
    /// The name of the queue.
    pub name: String,
}

impl Config {
    /// Opens the file, if the queue is in a file. `supervisor` supervises the file's thread and the
    /// tokio tasks of the broker's publishers.
    ///
    /// # Errors
    /// [`OpenError`], such as [`OpenError::InUse`] if another process has the file open.
    pub fn open(&self, supervisor: &Supervisor) -> Result<Broker, OpenError> {
        let backend = match &self.amqp_uri {
            BrokerUrl::Amqp(uri) => Backend::Amqp(self.access(uri)),
            BrokerUrl::Sqlite(location) => {
                Backend::Sqlite(Arc::new(Queue::open(location.path(), FORMAT, supervisor)?))
            }
        };
        Ok(Broker { backend, queue: self.queue.clone(), supervisor: supervisor.clone() })
    }
}

impl Broker {
    /// Whether the queue is in a file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        matches!(self.backend, Backend::Sqlite(_))
    }

    /// The queue, as it is named in traces.
    #[must_use]
    pub fn destination(&self) -> Destination {
        let system = if self.is_file() { "sqlite" } else { "rabbitmq" };
        Destination { system, name: self.queue.queue_name.clone() }
    }

    /// How to connect to RabbitMQ, for example for events; `None` if the queue is in a file.
    #[must_use]
    pub fn access(&self) -> Option<Access> {
        match &self.backend {
            Backend::Amqp(access) => Some(access.clone()),
            Backend::Sqlite(_) => None,
        }
    }

    /// `Err` while a damaged file is kept beside this one. The text names that file, and says what
    /// the operator has to do. `None` if the queue is not in a file.
    #[must_use]
    pub fn kept(&self) -> Option<watch::Receiver<Status>> {
        match &self.backend {
            Backend::Amqp(_) => None,
            Backend::Sqlite(queue) => Some(queue.file.kept()),
        }
    }

    /// Closes the file, unless something else in this process still uses it.
    pub async fn close(self) {
        if let Backend::Sqlite(queue) = self.backend {
            queue.close().await;
        }
    }
}
