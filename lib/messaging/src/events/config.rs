//! Settings of the events, for services that do not use the queue itself.

use crate::amqp::{Access, BrokerUrl, settings};
use crate::events::exchange::Exchange;

/// Settings of the exchange that carries the events.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Events")]
#[group(skip)]
pub struct Config {
    /// RabbitMQ that carries the events, as amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…;
    /// without it, or with a file, there are no events
    #[arg(long)]
    pub amqp_uri: Option<BrokerUrl>,
    /// Name of the queue; the exchange of its events has the same name with `.events` appended
    #[arg(long, default_value = "objects", value_parser = settings::queue_name)]
    pub queue_name: String,
    /// PEM certificates of authorities to trust for amqps://, in addition to the system's; usually
    /// set by `AMQP_CA_FILE`, which names a file
    #[arg(long, value_parser = settings::certificates)]
    pub amqp_ca: Option<String>,
}

impl Config {
    /// The exchange that the settings describe.
    #[must_use]
    pub fn exchange(&self) -> Exchange {
        match &self.amqp_uri {
            Some(BrokerUrl::Amqp(uri)) => {
                let access = Access { uri: uri.clone(), authorities: self.amqp_ca.clone() };
                Exchange::on_rabbitmq(access, &self.queue_name)
            }
            Some(BrokerUrl::Sqlite(_)) | None => Exchange::disabled(),
        }
    }
}
