//! The consumer's settings.

use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::ArgAction;
use events::Exchange;
use service::settings;

/// The deliveries that may wait for a lookup, for each lookup in flight. At 5 s for a lookup, the
/// last of them is looked up within minutes, long before RabbitMQ takes it back.
const WAITING_PER_LOOKUP: u16 = 40;
/// The most deliveries that may wait for a lookup: 4 MB at about 1 KB each.
const WAITING_MAX: u16 = 4_000;
/// With `MAX_LOOKUPS_PER_SECOND`, at most this many seconds' worth of lookups may wait.
const WAITING_SECONDS: u32 = 60;

/// The maximum is far below the 30 minutes after which RabbitMQ takes a delivery back.
const STATUS_TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_mins(5);
/// The deliveries of results are not acked while the results wait.
const WRITE_BATCH_LINGER: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_mins(1);

const LOOKUPS_PER_SECOND_MIN: NonZeroU32 = NonZeroU32::MIN;
/// More than a process can do.
const LOOKUPS_PER_SECOND_MAX: NonZeroU32 = NonZeroU32::new(100_000).unwrap();

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
    /// Where to publish events, if not on the broker of the queue. Not a setting.
    #[arg(skip)]
    pub events: Option<Exchange>,
}

impl Config {
    /// Where to publish events. With a queue in a file there is no exchange for them, unless
    /// `events` is set.
    pub(crate) fn exchange(&self) -> Exchange {
        let on_broker = || {
            let access = self.broker.access();
            access.map(|access| Exchange::on_rabbitmq(access, &self.broker.queue.queue_name))
        };
        self.events.clone().or_else(on_broker).unwrap_or_else(Exchange::disabled)
    }
}

/// How objects are looked up, and how the results are written.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Lookups")]
#[group(skip)]
pub struct Lookups {
    /// Maximum number of lookups in flight in this process
    #[arg(long, value_parser = settings::number(1..=50_000_u16), default_value = "100")]
    pub max_consumers: u16,
    /// Whether the limit on lookups is fixed, or falls while load makes the status API slower
    #[arg(long, value_enum, ignore_case = true, default_value = "fixed")]
    pub concurrency: Concurrency,
    /// Maximum number of lookups that start per second in this process; unlimited by default
    #[arg(long, value_parser = settings::number(LOOKUPS_PER_SECOND_MIN..=LOOKUPS_PER_SECOND_MAX))]
    pub max_lookups_per_second: Option<NonZeroU32>,
    /// Whether deliveries of one object that wait for a lookup share one lookup
    #[arg(long, action = ArgAction::Set, value_parser = settings::switch, default_value = "on")]
    pub coalesce: bool,
    /// URL of the status API; objects are looked up under its path /objects/
    #[arg(long, visible_alias = "status-api", value_parser = endpoint, default_value = "http://localhost:9010")]
    pub tester_endpoint: reqwest::Url,
    /// Timeout of a lookup, including the connection setup
    #[arg(long, value_parser = settings::duration(STATUS_TIMEOUT), default_value = "5s")]
    pub status_timeout: Duration,
    /// What a 404 means: the object is offline, unless a gateway sent the 404; or the lookup has
    /// failed
    #[arg(long, value_enum, ignore_case = true, default_value = "offline")]
    pub status_404: Status404,
    /// Number of attempts after which a message becomes a dead letter
    #[arg(long, value_parser = settings::number(1..=1_000_u32), default_value = "8")]
    pub max_attempts: u32,
    /// Percentage of failed lookups at which the breaker opens, because the status API counts as
    /// away
    #[arg(long, value_parser = settings::number(10..=100_u8), default_value = "85")]
    pub breaker_failure_percent: u8,
    /// Number of most recent lookups that the breaker considers
    #[arg(long, value_parser = settings::number(20..=1_000_u16), default_value = "50")]
    pub breaker_window: u16,
    /// Maximum number of rows written by one statement
    #[arg(long, value_parser = settings::number(1..=10_000_u16), default_value = "1000", help_heading = "Writes")]
    pub write_batch_max: u16,
    /// How long a result may wait for others to be written in the same batch
    #[arg(long, value_parser = settings::duration(WRITE_BATCH_LINGER), default_value = "10ms", help_heading = "Writes")]
    pub write_batch_linger: Duration,
}

/// What limits the lookups in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Concurrency {
    /// `MAX_CONSUMERS`.
    Fixed,
    /// The number that the status API sustains without becoming slower, from 1 to `MAX_CONSUMERS`.
    Adaptive,
}

/// What a response with status 404 means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Status404 {
    /// The object is offline, if the response has no body or a JSON object that mentions no route.
    Offline,
    /// The lookup has failed. For an API that answers 200 for every object.
    Failed,
}

impl Lookups {
    /// The variables whose changes the consumer applies while it runs.
    pub const RELOADABLE: &[&str] = &[
        "MAX_CONSUMERS",
        "MAX_LOOKUPS_PER_SECOND",
        "STATUS_TIMEOUT",
        "STATUS_404",
        "MAX_ATTEMPTS",
        "BREAKER_FAILURE_PERCENT",
        "BREAKER_WINDOW",
    ];

    /// These settings with the reloadable ones of `new`.
    pub(crate) fn with_reloadable(&self, new: &Self) -> Self {
        Self {
            max_consumers: new.max_consumers,
            max_lookups_per_second: new.max_lookups_per_second,
            status_timeout: new.status_timeout,
            status_404: new.status_404,
            max_attempts: new.max_attempts,
            breaker_failure_percent: new.breaker_failure_percent,
            breaker_window: new.breaker_window,
            ..self.clone()
        }
    }

    /// How many objects may be in flight or have unwritten results: `max_consumers` lookups and as
    /// many results, but at most one batch of results. Otherwise, lookups would stop during commits.
    pub(crate) fn unsettled_lookups_max(&self) -> u16 {
        self.max_consumers.saturating_add(self.max_consumers.min(self.write_batch_max))
    }

    // Decision: docs/decisions/0024-how-large-is-the-prefetch.md
    /// How many unsettled deliveries to take: those whose lookup has started, and those that wait
    /// for one, so that lookups can be coalesced. With more, this process would hold deliveries
    /// that another one could look up.
    pub(crate) fn prefetch(&self) -> u16 {
        if !self.coalesce {
            return self.unsettled_lookups_max();
        }
        let by_rate = self
            .max_lookups_per_second
            .map_or(u32::MAX, |per_second| per_second.get().saturating_mul(WAITING_SECONDS));
        let by_rate = u16::try_from(by_rate).unwrap_or(WAITING_MAX);
        let by_lookups = self.max_consumers.saturating_mul(WAITING_PER_LOOKUP);
        self.unsettled_lookups_max().saturating_add(by_lookups.min(by_rate).min(WAITING_MAX))
    }
}

/// Parses a base URL under which paths are requested. It has no query and no fragment, because they
/// would swallow the path, and no `@` after the host, because that would be the end of a password
/// that is not encoded.
fn endpoint(text: &str) -> Result<reqwest::Url, String> {
    let is_base = |url: &reqwest::Url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.query().is_none()
            && url.fragment().is_none()
            && !url.path().contains('@')
    };
    text.parse().ok().filter(is_base).ok_or_else(|| {
        "expected http://HOST:PORT or https://…, with an optional path, without a query (?) or fragment (#); in a \
         password, write / ? # @ as %2F %3F %23 %40"
            .to_owned()
    })
}

#[cfg(test)]
impl Lookups {
    /// Parses flags such as `--max-consumers=7`.
    pub(crate) fn of(flags: &[&str]) -> Self {
        use clap::{Args as _, FromArgMatches as _};
        let command = Self::augment_args(clap::Command::new("consumer"));
        let flags = std::iter::once("consumer").chain(flags.iter().copied());
        Self::from_arg_matches(&command.get_matches_from(flags)).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use clap::Args as _;

    use super::*;

    #[test]
    fn exactly_the_reloadable_settings_change_at_run_time() {
        let value = |name: &str| match name {
            "TESTER_ENDPOINT" => "http://elsewhere",
            "CONCURRENCY" => "adaptive",
            "COALESCE" => "off",
            "STATUS_404" => "failed",
            "STATUS_TIMEOUT" | "WRITE_BATCH_LINGER" => "70ms",
            _ => "70",
        };
        let command = Lookups::augment_args(clap::Command::new("consumer"));
        let (mut all, mut live) = (Vec::new(), Vec::new());
        for argument in command.get_arguments() {
            let name = argument.get_id().as_str().to_uppercase();
            let flag = format!("--{}={}", name.to_lowercase().replace('_', "-"), value(&name));
            if Lookups::RELOADABLE.contains(&name.as_str()) {
                live.push(flag.clone());
            }
            all.push(flag);
        }
        assert_eq!((live.len(), all.len()), (Lookups::RELOADABLE.len(), 12));
        let of =
            |flags: &[String]| Lookups::of(&flags.iter().map(String::as_str).collect::<Vec<_>>());
        let changed = of(&[]).with_reloadable(&of(&all));
        assert_eq!(format!("{changed:?}"), format!("{:?}", of(&live)));
    }

    // Field case 5.2.
    #[test]
    fn an_endpoint_is_a_base_url() {
        for allowed in ["http://api", "https://api:8443/v1", "http://me:a%2Fb%3F@api/v1/"] {
            endpoint(allowed).unwrap();
        }
        for refused in [
            "http://api/v1?key=secret",
            "http://api/v1?",
            "http://api/v1#key",
            "http://me:12/34@api",
            "http://me:p?x@api",
            "ftp://api",
            "api:9010",
        ] {
            let error = endpoint(refused).unwrap_err();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn waiting_deliveries_are_looked_up_within_minutes() {
        let waiting = |flags: &[&str]| {
            let lookups = Lookups::of(flags);
            lookups.prefetch() - lookups.unsettled_lookups_max()
        };
        assert_eq!(waiting(&[]), 4_000);
        assert_eq!(waiting(&["--max-consumers=5"]), 200);
        assert_eq!(waiting(&["--max-lookups-per-second=5"]), 300);
        assert_eq!(waiting(&["--max-lookups-per-second=5000"]), 4_000);
        assert_eq!(waiting(&["--coalesce=off"]), 0);
    }
}
