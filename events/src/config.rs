//! Where events are told, for services that have no use for the queue itself.

use std::fmt;
use std::str::FromStr;

use amqp::{Access, AmqpUri, settings};

use crate::Exchange;

/// Where events are told.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Events")]
#[group(skip)]
pub struct Config {
    /// The RabbitMQ on which events are told, as amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…; without it, or with a file, they are not
    #[arg(long)]
    pub amqp_uri: Option<EventsUrl>,
    /// The queue whose events they are: the exchange is called so, with `.events` added
    #[arg(long, default_value = "objects", value_parser = settings::queue_name)]
    pub queue_name: String,
    /// Certificates, as PEM, of authorities to trust for amqps:// besides the system's; mostly by `AMQP_CA_FILE`, a file with them
    #[arg(long, value_parser = settings::certificates)]
    pub amqp_ca: Option<String>,
    /// One that was made before, instead of all these; no setting can name it.
    #[arg(skip)]
    pub made: Option<Exchange>,
}

impl Config {
    /// That exchange, and no settings.
    #[must_use]
    pub fn made(exchange: Exchange) -> Self {
        Self {
            amqp_uri: None,
            queue_name: "objects".to_owned(),
            amqp_ca: None,
            made: Some(exchange),
        }
    }

    /// What the settings lead to.
    #[must_use]
    pub fn exchange(&self) -> Exchange {
        match (&self.made, &self.amqp_uri) {
            (Some(exchange), _) => exchange.clone(),
            (None, Some(EventsUrl(Some(uri)))) => {
                let access = Access { uri: uri.clone(), authorities: self.amqp_ca.clone() };
                Exchange::on(access, &self.queue_name)
            }
            (None, Some(EventsUrl(None)) | None) => Exchange::nowhere(),
        }
    }
}

/// The URL of a queue, by which events go over a RabbitMQ, or, if it is in a file, nowhere. Its `Debug`
/// and its errors leave out the user and the password.
#[derive(Clone)]
pub struct EventsUrl(Option<AmqpUri>);

impl FromStr for EventsUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with("sqlite:") {
            return Ok(Self(None));
        }
        let uri = text.parse();
        uri.map(|uri| Self(Some(uri))).map_err(|()| {
            "expected amqp://USER:PASSWORD@HOST:PORT/VHOST, amqps://… or sqlite:PATH".to_owned()
        })
    }
}

impl fmt::Debug for EventsUrl {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(uri) => uri.fmt(formatter),
            None => formatter.write_str("a file"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_shows_the_password() {
        let url: EventsUrl = "amqp://me:s3cret@host:5671/x".parse().unwrap();
        assert_eq!(format!("{url:?}"), "amqp://***@host:5671/x");
        assert!(!"http://me:s3cret@host".parse::<EventsUrl>().unwrap_err().contains("s3cret"));
    }
}
