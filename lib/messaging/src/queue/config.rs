//! Settings of the broker and of the queue on it.

use runtime::settings::{Check, number};

use crate::amqp::{Access, AmqpUri, BrokerUrl, settings};

/// Each process inspects every shard every few seconds, and a consumer has a prefetch for each.
pub(crate) const SHARDS_MAX: u16 = 32;

/// The broker's settings.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Broker")]
#[group(skip)]
pub struct Config {
    /// RabbitMQ, as amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…, with several hosts for a
    /// cluster: HOST:PORT,HOST:PORT; or sqlite:PATH for a queue in a file of one process
    #[arg(long, default_value = "amqp://guest:guest@localhost:5672/%2f")]
    pub amqp_uri: BrokerUrl,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "documented at its type; text here would replace the help text"
    )]
    pub queue: QueueConfig,
}

impl Config {
    pub(crate) fn access(&self, uri: &AmqpUri) -> Access {
        Access { uri: uri.clone(), authorities: self.queue.amqp_ca.clone() }
    }
}

impl Check for Config {
    fn check(&self) -> Result<(), String> {
        let shards = self.queue.shards;
        if matches!(self.amqp_uri, BrokerUrl::Sqlite(_)) && shards > 1 {
            return Err(format!(
                "SHARDS={shards}: expected 1, because a queue in a file has no shards; AMQP_URI \
                 must name RabbitMQ for more"
            ));
        }
        Ok(())
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
    /// Number of queues among which the messages are distributed by object, so that several
    /// consumers share the load without looking up an object twice; 1 means the queue itself
    #[arg(long, global = true, default_value = "1", value_parser = number(1..=SHARDS_MAX))]
    pub shards: u16,
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
