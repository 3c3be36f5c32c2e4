//! Which broker, and which queue on it.

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
    /// The RabbitMQ to use, as amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…; or sqlite:PATH, a queue in a file for one process
    #[arg(long, default_value = "amqp://guest:guest@localhost:5672/%2f")]
    pub amqp_uri: BrokerUrl,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub queue: QueueConfig,
}

/// The queue as traces name it.
#[derive(Clone, Debug)]
pub struct Destination {
    /// What it is on: `rabbitmq` or `sqlite`.
    pub system: &'static str,
    /// What it is called.
    pub name: String,
}

/// A file that is open for this process; see [`Config::claim`].
pub struct Claim {
    queue: Option<Arc<Queue>>,
}

impl Claim {
    /// `Err` while a damaged file is kept beside this one: which, and what is to be done with it. `None` if the
    /// queue is not in a file.
    #[must_use]
    pub fn kept(&self) -> Option<watch::Receiver<LinkStatus>> {
        self.queue.as_ref().map(|queue| queue.kept())
    }

    /// Closes the file, if nobody else of this process has it open.
    pub async fn close(self) {
        if let Some(queue) = self.queue {
            queue.close().await;
        }
    }
}

impl Config {
    /// Opens the queue's file, if it is in one, before anything else is begun: whoever uses a clone of
    /// these settings while the claim is held has it open already.
    ///
    /// # Errors
    /// [`OpenError`], such as [`OpenError::InUse`].
    pub fn claim(&self) -> Result<Claim, OpenError> {
        let queue = match &self.amqp_uri.0 {
            Backend::Amqp(_) => None,
            Backend::Sqlite(location) => Some(location.open(Queue::open)?),
        };
        Ok(Claim { queue })
    }

    /// How to get to the RabbitMQ, for what else there is on it; `None` if the queue is in a file.
    #[must_use]
    pub fn access(&self) -> Option<Access> {
        match &self.amqp_uri.0 {
            Backend::Amqp(uri) => Some(self.access_with(uri)),
            Backend::Sqlite(_) => None,
        }
    }

    /// The queue as traces name it.
    #[must_use]
    pub fn destination(&self) -> Destination {
        let system = if self.amqp_uri.is_file() { "sqlite" } else { "rabbitmq" };
        Destination { system, name: self.queue.queue_name.clone() }
    }

    pub(crate) fn access_with(&self, uri: &AmqpUri) -> Access {
        Access { uri: uri.clone(), authorities: self.queue.amqp_ca.clone() }
    }
}

/// Which queue of a RabbitMQ, and whom to trust about it. A file holds one queue only, and has no use
/// for these.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Broker")]
#[group(skip)]
pub struct QueueConfig {
    /// RabbitMQ's queue; `.retry.*` and `.dead` are added to its name for retries and dead letters
    #[arg(long, global = true, default_value = "objects", value_parser = settings::queue_name)]
    pub queue_name: String,
    /// How RabbitMQ's queue is declared: quorum, or classic without arguments, as the Go services do
    #[arg(long, global = true, value_enum, ignore_case = true, default_value = "quorum")]
    pub queue_type: QueueType,
    /// Certificates, as PEM, of authorities to trust for amqps:// besides the system's; mostly by `AMQP_CA_FILE`, a file with them
    #[arg(long, global = true, value_parser = settings::certificates)]
    pub amqp_ca: Option<String>,
}

/// How the queue is declared when it does not exist yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum QueueType {
    /// Replicated and always on disk; with a delivery limit that leads to the dead letters.
    Quorum,
    /// Durable and without arguments, so that the Go services can share it.
    Classic,
}

/// Where the queue is: on a RabbitMQ, or in a file. Its `Debug` and its errors leave out the user
/// and the password. Clones of one that names a file share the opened file.
#[derive(Clone)]
pub struct BrokerUrl(pub(crate) Backend);

/// What a [`BrokerUrl`] leads to.
#[derive(Clone)]
pub(crate) enum Backend {
    Amqp(AmqpUri),
    Sqlite(Location<Queue>),
}

impl BrokerUrl {
    /// The queue in the file at `path`, which is made when it is first opened.
    #[must_use]
    pub fn file(path: PathBuf) -> Self {
        Self(Backend::Sqlite(Location::new(path)))
    }

    /// Whether the queue is in a file, and not on a RabbitMQ.
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
            "expected amqp://USER:PASSWORD@HOST:PORT/VHOST, amqps://… or sqlite:PATH, without : or ? in PATH".to_owned()
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
    fn the_scheme_says_which_of_the_two_it_is() {
        let is_file = |url: &str| matches!(url.parse::<BrokerUrl>().unwrap().0, Backend::Sqlite(_));
        assert!(is_file("sqlite:data/queue.db"));
        assert!(!is_file("amqp://host"));
        assert!("sqlite::memory:".parse::<BrokerUrl>().is_err());
    }

    #[test]
    fn the_debug_text_and_the_error_do_not_show_the_password() {
        let uri: BrokerUrl = "amqp://me:s3cret@host:5671/x".parse().unwrap();
        assert_eq!(format!("{uri:?}"), "amqp://***@host:5671/x");
        assert!(!"http://me:s3cret@host".parse::<BrokerUrl>().unwrap_err().contains("s3cret"));
    }
}
