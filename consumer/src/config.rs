//! The consumer's settings.

use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::ArgAction;
use messaging::queue::Prefetch;
use runtime::settings::{self, Checked};

/// The most deliveries that may wait for a lookup, as a multiple of `MAX_CONSUMERS`. If each lookup
/// takes five seconds, the last of these deliveries waits for 200 s; RabbitMQ allows 30 minutes.
const WAITING_PER_LOOKUP: u16 = 40;
/// The most deliveries that may wait for a lookup, regardless of `MAX_CONSUMERS`: 4 MB at about
/// 1 KB each.
const WAITING_MAX: u16 = 4_000;
/// With `MAX_LOOKUPS_PER_SECOND`, at most this many seconds' worth of lookups may wait.
const WAITING_SECONDS: u32 = 60;

/// The maximum is far below the 30 minutes after which RabbitMQ takes a delivery back.
const STATUS_TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_mins(5);
/// The maximum is low, because deliveries stay unacked while their results wait.
const WRITE_BATCH_LINGER: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_mins(1);

const LOOKUPS_PER_SECOND_MIN: NonZeroU32 = NonZeroU32::MIN;
/// No process reaches a higher rate.
const LOOKUPS_PER_SECOND_MAX: NonZeroU32 = NonZeroU32::new(100_000).unwrap();

/// The consumer's settings.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
#[expect(missing_docs, reason = "documented at their types; text here would replace the help's")]
pub struct Config {
    #[command(flatten)]
    pub lookups: Lookups,
    #[command(flatten)]
    pub broker: Checked<messaging::queue::Config>,
    #[command(flatten)]
    pub store: store::Config,
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
    pub tester_endpoint: url::Url,
    /// Timeout of a lookup, including the connection setup
    #[arg(long, value_parser = settings::duration(STATUS_TIMEOUT), default_value = "5s")]
    pub status_timeout: Duration,
    /// What a 404 means: the object is offline, unless a gateway sent the 404; or the lookup has
    /// failed
    #[arg(long, value_enum, ignore_case = true, default_value = "offline")]
    pub status_404: Status404,
    /// Whether lookups may use HTTP/2: with an https URL, if the status API offers it
    #[arg(long, action = ArgAction::Set, value_parser = settings::switch, default_value = "on")]
    pub status_http2: bool,
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

    /// The most objects whose lookup is in flight or whose result is not committed: `max_consumers`
    /// lookups, and as many results, but at most one batch of them. Without room for results,
    /// lookups would stop during commits.
    pub(crate) fn unsettled_lookups_max(&self) -> u16 {
        self.max_consumers.saturating_add(self.max_consumers.min(self.write_batch_max))
    }

    // Decision: docs/decisions/0024-how-large-is-the-prefetch.md
    /// How many unsettled deliveries to take: those whose lookup has started, and those that wait
    /// for a lookup, so that lookups can be coalesced. With more, this process would hold
    /// deliveries that another consumer could look up.
    pub(crate) fn prefetch(&self) -> Prefetch {
        Prefetch { in_work: self.unsettled_lookups_max(), waiting: self.waiting_max() }
    }

    fn waiting_max(&self) -> u16 {
        if !self.coalesce {
            return 0;
        }
        let by_rate = self
            .max_lookups_per_second
            .map_or(u32::MAX, |per_second| per_second.get().saturating_mul(WAITING_SECONDS));
        let by_rate = u16::try_from(by_rate).unwrap_or(WAITING_MAX);
        let by_lookups = self.max_consumers.saturating_mul(WAITING_PER_LOOKUP);
        by_lookups.min(by_rate).min(WAITING_MAX)
    }
}

/// Parses a base URL, to which the path of a lookup is appended. A query or a fragment is not
/// allowed, because the path would become a part of it. An `@` in the path is not allowed either,
/// because it shows that the user name or the password is not percent-encoded.
fn endpoint(text: &str) -> Result<url::Url, String> {
    let is_base = |url: &url::Url| {
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
        testkit::parse(flags)
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
            "COALESCE" | "STATUS_HTTP2" => "off",
            "STATUS_404" => "failed",
            "STATUS_TIMEOUT" | "WRITE_BATCH_LINGER" => "70ms",
            _ => "70",
        };
        let command = Lookups::augment_args(clap::Command::new("consumer"));
        let (mut all, mut reloadable) = (Vec::new(), Vec::new());
        for argument in command.get_arguments() {
            let name = argument.get_id().as_str().to_uppercase();
            let flag = format!("--{}={}", name.to_lowercase().replace('_', "-"), value(&name));
            if Lookups::RELOADABLE.contains(&name.as_str()) {
                reloadable.push(flag.clone());
            }
            all.push(flag);
        }
        assert_eq!((reloadable.len(), all.len()), (Lookups::RELOADABLE.len(), 13));
        let of =
            |flags: &[String]| Lookups::of(&flags.iter().map(String::as_str).collect::<Vec<_>>());
        let changed = of(&[]).with_reloadable(&of(&all));
        assert_eq!(format!("{changed:?}"), format!("{:?}", of(&reloadable)));
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
    fn prefetch_bounds_the_waiting_deliveries() {
        let waiting = |flags: &[&str]| Lookups::of(flags).prefetch().waiting;
        assert_eq!(waiting(&[]), 4_000);
        assert_eq!(waiting(&["--max-consumers=5"]), 200);
        assert_eq!(waiting(&["--max-lookups-per-second=5"]), 300);
        assert_eq!(waiting(&["--max-lookups-per-second=5000"]), 4_000);
        assert_eq!(waiting(&["--coalesce=off"]), 0);
    }
}
