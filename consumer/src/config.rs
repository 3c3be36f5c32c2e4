//! The consumer's settings.

use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::time::Duration;

use clap::ArgAction;
use events::Exchange;
use service::settings;

/// Deliveries that wait for a lookup, for each that may run: at 5 s for a lookup, the last of them has
/// its turn within minutes, long before RabbitMQ takes it back.
const WAITING_PER_LOOKUP: u16 = 40;
/// At about 1 KB each they take 4 MB.
const WAITING_MAX: u16 = 4_000;

/// Where lookups per second have a limit, so many seconds' worth of them.
const WAITING_SECONDS: u32 = 60;

/// The most is far below the 30 minutes after which RabbitMQ takes a delivery back.
const STATUS_TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_mins(5);
/// Results are unacknowledged while they wait.
const WRITE_BATCH_LINGER: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_mins(1);

const LEAST_PER_SECOND: NonZeroU32 = NonZeroU32::MIN;
/// More than a process can do.
const MOST_PER_SECOND: NonZeroU32 = NonZeroU32::new(100_000).unwrap();

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
    /// Where to tell what is committed, if not on the broker of the queue; no setting can name it.
    #[arg(skip)]
    pub events: Option<Exchange>,
}

impl Config {
    /// Where to tell what is committed: with a queue in a file, nobody could hear it.
    pub(crate) fn exchange(&self) -> Exchange {
        let on_the_broker = || {
            let access = self.broker.access();
            access.map(|access| Exchange::on(access, &self.broker.queue.queue_name))
        };
        self.events.clone().or_else(on_the_broker).unwrap_or_else(Exchange::nowhere)
    }
}

/// How objects are looked up, and how the results are written.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Lookups")]
#[group(skip)]
pub struct Lookups {
    /// How many lookups run at once in this process
    #[arg(long, value_parser = settings::number(1..=50_000_u16), default_value = "100")]
    pub max_consumers: u16,
    /// Whether always so many may run, or fewer while the status API is slower the more it is asked
    #[arg(long, value_enum, ignore_case = true, default_value = "fixed")]
    pub concurrency: Concurrency,
    /// How many lookups may begin in a second in this process; without it, as many as come to an end
    #[arg(long, value_parser = settings::number(LEAST_PER_SECOND..=MOST_PER_SECOND))]
    pub max_lookups_per_second: Option<NonZeroU32>,
    /// Whether deliveries of one object that wait for a lookup share it
    #[arg(long, action = ArgAction::Set, value_parser = settings::switch, default_value = "on")]
    pub coalesce: bool,
    /// The status API; objects are looked up under its path /objects/
    #[arg(long, visible_alias = "status-api", value_parser = endpoint, default_value = "http://localhost:9010")]
    pub tester_endpoint: reqwest::Url,
    /// How long a lookup may take, connecting included
    #[arg(long, value_parser = settings::duration(STATUS_TIMEOUT), default_value = "5s")]
    pub status_timeout: Duration,
    /// What a 404 means: the object is offline, if it can be the status API's own answer; or always a failed lookup
    #[arg(long, value_enum, ignore_case = true, default_value = "offline")]
    pub status_404: Status404,
    /// How often a lookup is tried before its message goes to the dead letters
    #[arg(long, value_parser = settings::number(1..=1_000_u32), default_value = "8")]
    pub max_attempts: u32,
    /// How many of a hundred lookups have to fail before the status API counts as away
    #[arg(long, value_parser = settings::number(10..=100_u8), default_value = "85")]
    pub breaker_failure_percent: u8,
    /// Of how many lookups, the latest ones
    #[arg(long, value_parser = settings::number(20..=1_000_u16), default_value = "50")]
    pub breaker_window: u16,
    /// The most rows written by one statement
    #[arg(long, value_parser = settings::number(1..=10_000_u16), default_value = "1000", help_heading = "Writes")]
    pub write_batch_max: u16,
    /// How long a result may wait for others to be written with
    #[arg(long, value_parser = settings::duration(WRITE_BATCH_LINGER), default_value = "10ms", help_heading = "Writes")]
    pub write_batch_linger: Duration,
}

/// What bounds the lookups at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Concurrency {
    /// `MAX_CONSUMERS`.
    Fixed,
    /// What the status API bears without becoming slower, from 1 to `MAX_CONSUMERS`.
    Adaptive,
}

/// What a response with status 404 means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Status404 {
    /// The object is offline, if the response has no body or a JSON object that is not about a route.
    Offline,
    /// The lookup has failed. For an API that answers 200 for every object.
    Failed,
}

impl Lookups {
    /// The variables whose changes the consumer applies while it runs.
    pub const LIVE: &[&str] = &[
        "MAX_CONSUMERS",
        "MAX_LOOKUPS_PER_SECOND",
        "STATUS_TIMEOUT",
        "STATUS_404",
        "MAX_ATTEMPTS",
        "BREAKER_FAILURE_PERCENT",
        "BREAKER_WINDOW",
    ];

    /// These, with what has changed in `now` and may.
    pub(crate) fn changed_to(&self, now: &Self) -> Self {
        Self {
            max_consumers: now.max_consumers,
            max_lookups_per_second: now.max_lookups_per_second,
            status_timeout: now.status_timeout,
            status_404: now.status_404,
            max_attempts: now.max_attempts,
            breaker_failure_percent: now.breaker_failure_percent,
            breaker_window: now.breaker_window,
            ..self.clone()
        }
    }

    /// How many objects may be looked up or have results that are not written: as many as are looked
    /// up, and as many again, up to one batch, or lookups would stand still during each commit.
    pub(crate) fn begun_max(&self) -> u16 {
        self.max_consumers.saturating_add(self.max_consumers.min(self.write_batch_max))
    }

    // Decision: docs/decisions/0024-how-large-is-the-prefetch.md
    /// How many deliveries to take without having settled them: those whose lookup has begun, and those
    /// that wait for one, so that there is something to coalesce. With more, this process would hoard
    /// what another could look up.
    pub(crate) fn prefetch(&self) -> u16 {
        if !self.coalesce {
            return self.begun_max();
        }
        let by_pace = self
            .max_lookups_per_second
            .map_or(u32::MAX, |per_second| per_second.get().saturating_mul(WAITING_SECONDS));
        let by_pace = u16::try_from(by_pace).unwrap_or(WAITING_MAX);
        let by_lookups = self.max_consumers.saturating_mul(WAITING_PER_LOOKUP);
        self.begun_max().saturating_add(by_lookups.min(by_pace).min(WAITING_MAX))
    }
}

/// A value parser for a base URL under which paths are requested: no query and no fragment, which would
/// swallow the path, and no `@` behind the host, which would be the end of a password that is not encoded.
fn endpoint(text: &str) -> Result<reqwest::Url, String> {
    let is_base = |url: &reqwest::Url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.query().is_none()
            && url.fragment().is_none()
            && !url.path().contains('@')
    };
    text.parse().ok().filter(is_base).ok_or_else(|| {
        "expected http://HOST:PORT or https://…, with a path if need be, without a query (?) or fragment (#); in a \
         password, write / ? # @ as %2F %3F %23 %40"
            .to_owned()
    })
}

#[cfg(test)]
impl Lookups {
    /// By flags such as `--max-consumers=7`.
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
    fn what_is_said_to_change_while_it_runs_does_and_nothing_else() {
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
            if Lookups::LIVE.contains(&name.as_str()) {
                live.push(flag.clone());
            }
            all.push(flag);
        }
        assert_eq!((live.len(), all.len()), (Lookups::LIVE.len(), 12));
        let of =
            |flags: &[String]| Lookups::of(&flags.iter().map(String::as_str).collect::<Vec<_>>());
        let changed = of(&[]).changed_to(&of(&all));
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
    fn what_waits_for_a_lookup_has_its_turn_within_minutes() {
        let waiting = |flags: &[&str]| {
            let lookups = Lookups::of(flags);
            lookups.prefetch() - lookups.begun_max()
        };
        assert_eq!(waiting(&[]), 4_000);
        assert_eq!(waiting(&["--max-consumers=5"]), 200);
        assert_eq!(waiting(&["--max-lookups-per-second=5"]), 300);
        assert_eq!(waiting(&["--max-lookups-per-second=5000"]), 4_000);
        assert_eq!(waiting(&["--coalesce=off"]), 0);
    }
}
