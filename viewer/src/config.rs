//! The viewer's settings.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use reqwest::Url;
use runtime::settings;

use crate::groups::GroupsConfig;
use crate::hosts::AllowedHost;

const OBJECT_TTL: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_hours(365 * 24);

/// The viewer's settings.
#[derive(Clone, Debug, clap::Args)]
#[command(mut_args(events_by_default))]
#[group(skip)]
#[expect(missing_docs, reason = "documented at their types; text here would replace the help's")]
pub struct Config {
    #[command(flatten)]
    pub view: View,
    #[command(flatten)]
    pub groups: GroupsConfig,
    /// How long an object stays in the table after it was last seen, as in the routine; an object
    /// in a group is late after two thirds of this time
    #[arg(
        long, value_parser = settings::duration(OBJECT_TTL), default_value = "30s",
        help_heading = "Groups"
    )]
    pub object_ttl: Duration,
    #[command(flatten)]
    pub events: messaging::events::Config,
    #[command(flatten)]
    pub store: store::Config,
}

/// Addresses, limits and metrics sources of the viewer.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Viewer")]
#[group(skip)]
pub struct View {
    /// Address of the page and the API; port 0 takes any free port, which the viewer logs
    #[arg(long, value_parser = settings::listen_address, default_value = ":9080")]
    pub viewer_addr: SocketAddr,
    /// Maximum number of open connections; each subscriber uses one. A further connection replaces
    /// the one that has been idle longest, or is answered 503 if none is idle
    #[arg(long, value_parser = settings::number(1..=1_000_000_usize), default_value = "11000")]
    pub viewer_max_connections: usize,
    /// Host names that requests may use, separated by commas, such as status.example.com,
    /// `*.example.com`, or `*` for any. Always allowed are this machine's own name, localhost, IP
    /// addresses, names without a dot and names of a private domain (.local, .internal, .svc)
    #[arg(long, value_delimiter = ',')]
    pub viewer_hosts: Vec<AllowedHost>,
    /// File in which the viewer saves what it shows, for its next start; each viewer needs its own
    /// [default: none; for lastseen: viewer.snapshot in `LASTSEEN_DIR`]
    #[arg(long, value_parser = snapshot_file)]
    pub viewer_snapshot: Option<PathBuf>,
    /// URLs of the services' metrics, which the page shows, separated by commas [default: producer,
    /// consumer and routine on localhost, at their default ports; for lastseen: itself]
    #[arg(long, value_delimiter = ',', value_parser = metrics_url)]
    pub viewer_metrics: Vec<Url>,
}

impl View {
    /// Where to read the metrics of each service. `is_pipeline` means that all services run in this
    /// process, which is then the default.
    pub(crate) fn metrics_sources(&self, is_pipeline: bool) -> Vec<MetricsSource> {
        let urls = &self.viewer_metrics;
        if urls.is_empty() && is_pipeline {
            return vec![MetricsSource::ThisProcess];
        }
        if urls.is_empty() {
            let defaults =
                [9091, 9092, 9093].map(|port| format!("http://localhost:{port}/metrics"));
            return defaults
                .iter()
                .filter_map(|url| url.parse().ok())
                .map(MetricsSource::Url)
                .collect();
        }
        urls.iter().cloned().map(MetricsSource::Url).collect()
    }
}

/// Where to read the metrics of a service.
#[derive(Clone, Debug)]
pub(crate) enum MetricsSource {
    ThisProcess,
    Url(Url),
}

/// Gives `AMQP_URI` a default, which the routine's does not have: without events, the viewer would
/// show changes only after its next reading of the table.
fn events_by_default(setting: clap::Arg) -> clap::Arg {
    if setting.get_id() != "amqp_uri" {
        return setting;
    }
    setting.default_value("amqp://guest:guest@localhost:5672/%2f")
}

fn snapshot_file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.file_name().is_none() || text.ends_with('/') || path.is_dir() {
        return Err("expected the path of a file, such as /var/lib/lastseen/viewer.snapshot".into());
    }
    Ok(path)
}

fn metrics_url(text: &str) -> Result<Url, String> {
    let url = text.parse::<Url>().ok().filter(|url| url.scheme() == "http" && url.has_host());
    // Anyone who can open the page can read this URL.
    let url = url.filter(|url| url.username().is_empty() && url.password().is_none());
    url.ok_or_else(|| "expected http://HOST:PORT/metrics, without user and password".to_owned())
}
