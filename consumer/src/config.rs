//! The consumer's settings.

use std::time::Duration;

use service::settings;

/// The consumer's settings.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub lookups: Lookups,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub broker: broker::Config,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub store: store::Config,
}

/// How objects are looked up, and how the results are written.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Lookups")]
#[group(skip)]
pub struct Lookups {
    /// How many lookups run at once in this process
    #[arg(long, value_parser = settings::number(1..=50_000_u16), default_value = "100")]
    pub max_consumers: u16,
    /// The status API; objects are looked up under its path /objects/
    #[arg(long, value_parser = endpoint, default_value = "http://localhost:9010")]
    pub tester_endpoint: reqwest::Url,
    /// How long a lookup may take, connecting included
    #[arg(long, value_parser = settings::duration, default_value = "5s")]
    pub status_timeout: Duration,
    /// How often a lookup is tried before its message goes to the dead letters
    #[arg(long, value_parser = settings::number(1..=1_000_u32), default_value = "8")]
    pub max_attempts: u32,
    /// The most rows written by one statement
    #[arg(long, value_parser = settings::number(1..=10_000_u16), default_value = "1000", help_heading = "Writes")]
    pub write_batch_max: u16,
    /// How long a result may wait for others to be written with
    #[arg(long, value_parser = settings::duration, default_value = "10ms", help_heading = "Writes")]
    pub write_batch_linger: Duration,
}

impl Lookups {
    /// How many deliveries to take without having settled them: those being looked up, and as many
    /// whose results wait to be written, up to one batch. With less, lookups would stand still
    /// during each commit; with more, this process would hoard what another could look up.
    pub(crate) fn prefetch(&self) -> u16 {
        self.max_consumers.saturating_add(self.max_consumers.min(self.write_batch_max))
    }
}

fn endpoint(text: &str) -> Result<reqwest::Url, String> {
    text.parse()
        .ok()
        .filter(|url: &reqwest::Url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or_else(|| "expected http://HOST:PORT or https://…".to_owned())
}
