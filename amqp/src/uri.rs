//! The URI of a RabbitMQ.

use std::fmt;
use std::str::FromStr;

use lapin::uri::AMQPUri;

/// An AMQP URI. `Debug` leaves out the user and the password.
#[derive(Clone)]
pub struct AmqpUri(pub(crate) AMQPUri);

impl FromStr for AmqpUri {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut uri: AMQPUri = text.parse().map_err(|_| ())?;
        // The Go services' client reads a bare trailing slash as the default vhost, and their
        // settings are reused.
        if uri.vhost.is_empty() {
            "/".clone_into(&mut uri.vhost);
        }
        // With the broker's default, a dead peer is noticed only after two minutes.
        uri.query.heartbeat.get_or_insert(5);
        // lapin keeps two buffers of 32 frames for each connection, and messages are below 1 KiB.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailing_slash_means_the_default_vhost() {
        for text in ["amqp://a:b@host:5672/", "amqp://a:b@host:5672/%2f", "amqp://a:b@host:5672"] {
            assert_eq!(text.parse::<AmqpUri>().unwrap().0.vhost, "/", "{text}");
        }
        assert_eq!("amqp://a:b@host/team".parse::<AmqpUri>().unwrap().0.vhost, "team");
    }

    #[test]
    fn heartbeat_defaults_to_five_seconds() {
        assert_eq!("amqp://host".parse::<AmqpUri>().unwrap().0.query.heartbeat, Some(5));
        let own = "amqp://host/x?heartbeat=30".parse::<AmqpUri>().unwrap();
        assert_eq!(own.0.query.heartbeat, Some(30));
    }
}
