//! The viewer's settings.

use std::net::SocketAddr;

use reqwest::Url;
use service::settings;

use crate::hosts::AllowedHost;

/// The viewer's settings.
#[derive(Clone, Debug, clap::Args)]
#[command(mut_args(events_by_default))]
#[group(skip)]
pub struct Config {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub view: View,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub events: events::Config,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub store: store::Config,
    /// Whether the services whose numbers are shown are in this process; no setting can say so.
    #[arg(skip)]
    pub is_among_them: bool,
}

/// Where it is shown, and what.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Viewer")]
#[group(skip)]
pub struct View {
    /// Where the page and the API are; port 0 takes any free one and logs it
    #[arg(long, value_parser = settings::listen_address, default_value = ":9080")]
    pub viewer_addr: SocketAddr,
    /// The most connections open at once, of which each subscriber has one; a further one replaces the one that has waited longest for a request, or is answered 503
    #[arg(long, value_parser = settings::number(1..=1_000_000_usize), default_value = "11000")]
    pub viewer_max_connections: usize,
    /// Host names that requests may use besides this machine's own, localhost, IP addresses and names without a dot or of a private domain (.local, .internal, .svc): such as status.example.com, `*.example.com`, or `*` for any; separated by commas
    #[arg(long, value_delimiter = ',')]
    pub viewer_hosts: Vec<AllowedHost>,
    /// The services whose numbers are shown, as URLs of their metrics, separated by commas [default: producer, consumer and routine on localhost, at their default ports; of lastseen: itself]
    #[arg(long, value_delimiter = ',', value_parser = metrics_url)]
    pub viewer_metrics: Vec<Url>,
}

impl Config {
    /// What the services' numbers are read from.
    pub(crate) fn services(&self) -> Vec<Service> {
        let given = &self.view.viewer_metrics;
        if given.is_empty() && self.is_among_them {
            return vec![Service::ThisProcess];
        }
        if given.is_empty() {
            let usual = [9091, 9092, 9093].map(|port| format!("http://localhost:{port}/metrics"));
            return usual.iter().filter_map(|url| url.parse().ok()).map(Service::At).collect();
        }
        given.iter().cloned().map(Service::At).collect()
    }
}

/// Where a service tells its numbers.
#[derive(Clone, Debug)]
pub(crate) enum Service {
    ThisProcess,
    At(Url),
}

/// Unlike the routine, it has little to show without events.
fn events_by_default(setting: clap::Arg) -> clap::Arg {
    if setting.get_id() != "amqp_uri" {
        return setting;
    }
    setting.default_value("amqp://guest:guest@localhost:5672/%2f")
}

fn metrics_url(text: &str) -> Result<Url, String> {
    let url = text.parse::<Url>().ok().filter(|url| url.scheme() == "http" && url.has_host());
    // It is shown to everybody.
    let url = url.filter(|url| url.username().is_empty() && url.password().is_none());
    url.ok_or_else(|| "expected http://HOST:PORT/metrics, without a user".to_owned())
}
