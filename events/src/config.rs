//! Settings of the events, for services that do not use the queue itself.

use std::fmt;
use std::str::FromStr;

use amqp::{Access, AmqpUri, settings};

use crate::Exchange;

/// Settings of the exchange that carries the events.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Events")]
#[group(skip)]
pub struct Config {
    /// RabbitMQ that carries the events, as amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…;
    /// without it, or with a file, there are no events
    #[arg(long)]
    pub amqp_uri: Option<EventsUrl>,
    /// Name of the queue; the exchange of its events has the same name with `.events` appended
    #[arg(long, default_value = "objects", value_parser = settings::queue_name)]
    pub queue_name: String,
    /// PEM certificates of authorities to trust for amqps://, in addition to the system's; usually
    /// set by `AMQP_CA_FILE`, which names a file
    #[arg(long, value_parser = settings::certificates)]
    pub amqp_ca: Option<String>,
    /// An existing exchange, which takes precedence over the settings above. It is not a setting.
    #[arg(skip)]
    pub existing: Option<Exchange>,
}

impl Config {
    /// Uses `exchange` and ignores the settings.
    #[must_use]
    pub fn with_exchange(exchange: Exchange) -> Self {
        Self {
            amqp_uri: None,
            queue_name: "objects".to_owned(),
            amqp_ca: None,
            existing: Some(exchange),
        }
    }

    /// The exchange that the settings describe.
    #[must_use]
    pub fn exchange(&self) -> Exchange {
        match (&self.existing, &self.amqp_uri) {
            (Some(exchange), _) => exchange.clone(),
            (None, Some(EventsUrl(Some(uri)))) => {
                let access = Access { uri: uri.clone(), authorities: self.amqp_ca.clone() };
                Exchange::on_rabbitmq(access, &self.queue_name)
            }
            (None, Some(EventsUrl(None)) | None) => Exchange::disabled(),
        }
    }
}

/// The URL of the queue. Events use the same RabbitMQ; a queue in a file has no events. `Debug` and
/// the errors leave out the user and the password.
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
    fn debug_text_and_error_hide_the_password() {
        let url: EventsUrl = "amqp://me:s3cret@host:5671/x".parse().unwrap();
        assert_eq!(format!("{url:?}"), "amqp://***@host:5671/x");
        assert!(!"http://me:s3cret@host".parse::<EventsUrl>().unwrap_err().contains("s3cret"));
    }
}
