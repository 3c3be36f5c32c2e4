//! Which broker, and which queue on it.

use std::fmt;
use std::str::FromStr;

use lapin::uri::AMQPUri;

/// The broker's settings.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Broker")]
#[group(skip)]
pub struct Config {
    /// The RabbitMQ to use, as amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…
    #[arg(long, default_value = "amqp://guest:guest@localhost:5672/%2f")]
    pub amqp_uri: AmqpUri,
    /// The queue; `.retry.*` and `.dead` are added to its name for retries and dead letters
    #[arg(long, default_value = "objects", value_parser = queue_name)]
    pub queue_name: String,
    /// How the queue is declared: quorum, or classic without arguments, as the Go services do
    #[arg(long, value_enum, ignore_case = true, default_value = "quorum")]
    pub queue_type: QueueType,
}

/// How the queue is declared when it does not exist yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum QueueType {
    /// Replicated and always on disk; with a delivery limit that leads to the dead letters.
    Quorum,
    /// Durable and without arguments, so that the Go services can share it.
    Classic,
}

/// An AMQP URI. Its `Debug` and its errors leave out the user and the password.
#[derive(Clone)]
pub struct AmqpUri(pub(crate) AMQPUri);

impl FromStr for AmqpUri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut uri: AMQPUri = text
            .parse()
            .map_err(|_| "expected amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…".to_owned())?;
        // Go's client, whose settings we take over, reads a bare trailing slash as the default vhost.
        if uri.vhost.is_empty() {
            "/".clone_into(&mut uri.vhost);
        }
        // The broker's default notices a dead peer after two minutes.
        uri.query.heartbeat.get_or_insert(5);
        // Our messages are below 1 KiB; lapin keeps two buffers of 32 frames for each connection.
        uri.query.frame_max.get_or_insert(16 * 1024);
        Ok(Self(uri))
    }
}

impl fmt::Debug for AmqpUri {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AMQPUri { scheme, authority, vhost, .. } = &self.0;
        write!(formatter, "{scheme}://***@{}:{}/{vhost}", authority.host, authority.port)
    }
}

/// RabbitMQ limits names to 255 bytes; ours get a suffix of up to 10, and `amq.` is its own.
fn queue_name(text: &str) -> Result<String, String> {
    if text.is_empty() || text.len() > 240 || text.starts_with("amq.") {
        return Err("expected a name of 1 to 240 bytes that does not start with amq.".to_owned());
    }
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trailing_slash_means_the_default_vhost_as_it_does_in_go() {
        for text in ["amqp://a:b@host:5672/", "amqp://a:b@host:5672/%2f", "amqp://a:b@host:5672"] {
            assert_eq!(text.parse::<AmqpUri>().unwrap().0.vhost, "/", "{text}");
        }
        assert_eq!("amqp://a:b@host/team".parse::<AmqpUri>().unwrap().0.vhost, "team");
    }

    #[test]
    fn a_heartbeat_is_asked_for_unless_the_uri_says_otherwise() {
        assert_eq!("amqp://host".parse::<AmqpUri>().unwrap().0.query.heartbeat, Some(5));
        let own = "amqp://host/x?heartbeat=30".parse::<AmqpUri>().unwrap();
        assert_eq!(own.0.query.heartbeat, Some(30));
    }

    #[test]
    fn the_debug_text_and_the_error_do_not_show_the_password() {
        let uri: AmqpUri = "amqp://me:s3cret@host:5671/x".parse().unwrap();
        assert_eq!(format!("{uri:?}"), "amqp://***@host:5671/x");
        assert!(!"http://me:s3cret@host".parse::<AmqpUri>().unwrap_err().contains("s3cret"));
    }
}
