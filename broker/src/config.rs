//! Settings of the broker and of the queue on it.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use ::amqp::{Access, AmqpUri, settings};
use embedded::{Location, OpenError};
use tokio::sync::watch;

use crate::LinkStatus;
use crate::sqlite::Queue;

/// The broker's settings.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Broker")]
#[group(skip)]
pub struct Config {
    /// RabbitMQ, as amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…; or sqlite:PATH for a queue
    /// in a file of one process
    #[arg(long, default_value = "amqp://guest:guest@localhost:5672/%2f")]
    pub amqp_uri: BrokerUrl,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "documented at its type; text here would replace the help text"
    )]
    pub queue: QueueConfig,
}

/// The queue, as it is named in traces.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The messaging system: `rabbitmq` or `sqlite`.
    pub system: &'static str,
    /// The name of the queue.
    pub name: String,
}

/// Keeps the queue's file open for this process; see [`Config::claim`].
pub struct Claim {
    queue: Option<Arc<Queue>>,
}

impl Claim {
    /// `Err` while a damaged file is kept beside this one: its name, and what the operator has to
    /// do. `None` if the queue is not in a file.
    #[must_use]
    pub fn kept(&self) -> Option<watch::Receiver<LinkStatus>> {
        self.queue.as_ref().map(|queue| queue.kept())
    }

    /// Closes the file, unless something else in this process still uses it.
    pub async fn close(self) {
        if let Some(queue) = self.queue {
            queue.close().await;
        }
    }
}

impl Config {
    /// Opens the file of a queue in a file. While the claim is held, all users of clones of these
    /// settings share the open file.
    ///
    /// # Errors
    /// [`OpenError`], such as [`OpenError::InUse`] if another process has the file open.
    pub fn claim(&self) -> Result<Claim, OpenError> {
        let queue = match &self.amqp_uri.0 {
            Backend::Amqp(_) => None,
            Backend::Sqlite(location) => Some(location.open(Queue::open)?),
        };
        Ok(Claim { queue })
    }

    /// How to connect to RabbitMQ, for example for events; `None` if the queue is in a file.
    #[must_use]
    pub fn access(&self) -> Option<Access> {
        match &self.amqp_uri.0 {
            Backend::Amqp(uri) => Some(self.access_with(uri)),
            Backend::Sqlite(_) => None,
        }
    }

    /// The queue, as it is named in traces.
    #[must_use]
    pub fn destination(&self) -> Destination {
        let system = if self.amqp_uri.is_file() { "sqlite" } else { "rabbitmq" };
        Destination { system, name: self.queue.queue_name.clone() }
    }

    pub(crate) fn access_with(&self, uri: &AmqpUri) -> Access {
        Access { uri: uri.clone(), authorities: self.queue.amqp_ca.clone() }
    }
}

/// The queue on RabbitMQ, and the trusted authorities. A queue in a file does not use these
/// settings.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Broker")]
#[group(skip)]
pub struct QueueConfig {
    /// Name of the queue on RabbitMQ; the queues for retries and dead letters append `.retry.*` and
    /// `.dead`
    #[arg(long, global = true, default_value = "objects", value_parser = settings::queue_name)]
    pub queue_name: String,
    /// How the queue on RabbitMQ is declared: quorum, or classic, which is compatible with the Go
    /// services
    #[arg(long, global = true, value_enum, ignore_case = true, default_value = "quorum")]
    pub queue_type: QueueType,
    /// PEM certificates of authorities to trust for amqps://, in addition to the system's; usually
    /// set by `AMQP_CA_FILE`, which names a file
    #[arg(long, global = true, value_parser = settings::certificates)]
    pub amqp_ca: Option<String>,
}

/// How the queue is declared if it does not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum QueueType {
    /// Replicated and always on disk. At the delivery limit, a message becomes a dead letter.
    Quorum,
    /// Durable, and compatible with the declaration of the Go services.
    Classic,
}

/// The location of the queue: on RabbitMQ, or in a file. `Debug` and the errors leave out the user
/// and the password. Clones share the open file.
#[derive(Clone)]
pub struct BrokerUrl(pub(crate) Backend);

/// The backend that a [`BrokerUrl`] selects.
#[derive(Clone)]
pub(crate) enum Backend {
    Amqp(AmqpUri),
    Sqlite(Location<Queue>),
}

impl BrokerUrl {
    /// The queue in the file at `path`, which is created when it is first opened.
    #[must_use]
    pub fn file(path: PathBuf) -> Self {
        Self(Backend::Sqlite(Location::new(path)))
    }

    /// Whether the queue is in a file.
    #[must_use]
    pub fn is_file(&self) -> bool {
        matches!(self.0, Backend::Sqlite(_))
    }
}

impl FromStr for BrokerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(location) = Location::from_url(text) {
            return Ok(Self(Backend::Sqlite(location)));
        }
        let uri = text.parse().map_err(|()| {
            "expected amqp://USER:PASSWORD@HOST:PORT/VHOST, amqps://… or sqlite:PATH, without : \
             or ? in PATH"
                .to_owned()
        });
        uri.map(|uri| Self(Backend::Amqp(uri)))
    }
}

impl std::fmt::Debug for BrokerUrl {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Backend::Amqp(uri) => uri.fmt(formatter),
            Backend::Sqlite(location) => location.fmt(formatter),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scheme_selects_the_backend() {
        let is_file = |url: &str| matches!(url.parse::<BrokerUrl>().unwrap().0, Backend::Sqlite(_));
        assert!(is_file("sqlite:data/queue.db"));
        assert!(!is_file("amqp://host"));
        assert!("sqlite::memory:".parse::<BrokerUrl>().is_err());
    }

    #[test]
    fn debug_text_and_error_hide_the_password() {
        let uri: BrokerUrl = "amqp://me:s3cret@host:5671/x".parse().unwrap();
        assert_eq!(format!("{uri:?}"), "amqp://***@host:5671/x");
        assert!(!"http://me:s3cret@host".parse::<BrokerUrl>().unwrap_err().contains("s3cret"));
    }
}
