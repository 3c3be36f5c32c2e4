//! The tester's settings: one struct per concern, with checks across their values.

use std::fmt::Debug;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgMatches, Args, Subcommand};
use runtime::authenticity::Authenticity;
use runtime::settings::{self, Check, Checked};
use url::Url;

/// The path to which the original system's partner posts.
const CALLBACK_PATH: &str = "/callback";
/// The amount by which the sum of shares may exceed 1, because sums of floats such as `0.1` are not
/// exact.
const SHARE_TOLERANCE: f64 = 1e-9;

const CALLBACK_TIMEOUT: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_mins(10);
const CALLBACK_INTERVAL: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_hours(24);
const LATENCY: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_hours(1);
const LOAD_DURATION: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_hours(365 * 24);

/// All settings of the tester.
///
/// The structs here form no groups of clap (`group(skip)`), because clap names a group after its
/// struct, and other crates on the same command line have structs of the same names.
#[derive(Clone, Debug, Args)]
#[group(skip)]
#[expect(missing_docs, reason = "documented at their types; text here would replace the help's")]
pub struct Config {
    #[command(flatten)]
    pub callbacks: Checked<Callbacks>,
    #[command(flatten)]
    pub authenticity: Authenticity,
    #[command(flatten)]
    pub partner: Checked<Partner>,
    #[command(flatten)]
    pub api: Checked<Api>,
    /// Do not simulate the partner: post no callbacks
    #[arg(long, conflicts_with = "no_api", help_heading = "Partner")]
    pub no_partner: bool,
    /// Do not simulate the status API: listen on no address but the admin one
    #[arg(long, help_heading = "Status API")]
    pub no_api: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// The commands that the tester runs instead of the simulation.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Send callbacks at a rate, or as fast as possible, and report their outcomes and latencies
    Load(Load),
}

/// The endpoint, the timeout and the ids of callbacks.
#[derive(Clone, Debug, Args)]
#[group(skip)]
#[command(next_help_heading = "Callbacks")]
pub struct Callbacks {
    /// URL to post callbacks to; the path is /callback if it has none
    #[arg(long, global = true, default_value = "http://localhost:9090/callback", value_parser = endpoint)]
    pub callback_endpoint: Url,
    /// Time to wait for the response to a callback, which is then given up and never sent again
    #[arg(long, global = true, default_value = "1s", value_parser = settings::duration(CALLBACK_TIMEOUT))]
    pub callback_timeout: Duration,
    /// Smallest object id in callbacks
    #[arg(long, global = true, default_value = "0", value_parser = object_id(), allow_negative_numbers = true)]
    pub object_id_min: i64,
    /// Largest object id in callbacks
    #[arg(long, global = true, default_value = "99", value_parser = object_id(), allow_negative_numbers = true)]
    pub object_id_max: i64,
}

/// The settings of the simulated partner.
#[derive(Clone, Debug, Args)]
#[group(skip)]
#[command(next_help_heading = "Partner")]
pub struct Partner {
    /// Time from one callback to the next
    #[arg(long, default_value = "5s", value_parser = settings::duration(CALLBACK_INTERVAL))]
    pub callback_interval: Duration,
    /// Fewest ids in a callback
    #[arg(long, default_value = "0", value_parser = settings::number(0..=1_000_000_usize))]
    pub callback_ids_min: usize,
    /// Most ids in a callback
    #[arg(long, default_value = "199", value_parser = settings::number(0..=1_000_000_usize))]
    pub callback_ids_max: usize,
}

/// The settings of the simulated status API.
#[derive(Clone, Debug, Args)]
#[group(skip)]
#[command(next_help_heading = "Status API")]
#[expect(missing_docs, reason = "documented at their types; text here would replace the help's")]
pub struct Api {
    /// Address of the status API; with port 0, any free port, which is logged
    #[arg(long, default_value = ":9010", value_parser = settings::listen_address)]
    pub tester_addr: SocketAddr,
    /// Shortest response time
    #[arg(long, default_value = "300ms", value_parser = settings::duration(LATENCY))]
    pub latency_min: Duration,
    /// Longest response time
    #[arg(long, default_value = "4300ms", value_parser = settings::duration(LATENCY))]
    pub latency_max: Duration,
    /// Share of the ids that are online, from 0 to 1, always the same ids; if not set, the even ids
    /// are online
    #[arg(long, value_parser = share())]
    pub online_share: Option<f64>,
    #[command(flatten)]
    pub failures: Failures,
}

/// The share of lookups that fail in each way; their sum is at most 1.
#[derive(Clone, Debug, Args)]
#[group(skip)]
#[command(next_help_heading = "Status API: failures to inject")]
pub struct Failures {
    /// Share of lookups answered 500
    #[arg(long, default_value = "0", value_parser = share())]
    pub fail_500_share: f64,
    /// Share of lookups answered 429 with `Retry-After: 1`
    #[arg(long, default_value = "0", value_parser = share())]
    pub fail_429_share: f64,
    /// Share of lookups never answered
    #[arg(long, default_value = "0", value_parser = share())]
    pub fail_hang_share: f64,
    /// Share of lookups answered 200 with a body that is not JSON
    #[arg(long, default_value = "0", value_parser = share())]
    pub fail_garbage_share: f64,
    /// Share of lookups answered with the status of another id
    #[arg(long, default_value = "0", value_parser = share())]
    pub fail_wrong_id_share: f64,
}

/// The settings of a load run. They are flags only, because their names are too common for
/// variables.
#[derive(Clone, Debug, Args)]
#[group(skip)]
#[command(next_help_heading = "Load (flags only, no variables)")]
pub struct Load {
    /// Callbacks per second, each sent when it is due regardless of earlier ones; if not given, as
    /// fast as possible
    #[arg(long, value_parser = settings::number(0.001..=1_000_000.0_f64))]
    pub rate: Option<f64>,
    /// Duration of the run; if not given, 10s, or unlimited if --total is given
    #[arg(long, value_parser = settings::duration(LOAD_DURATION))]
    pub duration: Option<Duration>,
    /// Number of callbacks after which to stop
    #[arg(long, value_parser = settings::number(1..=1_000_000_000_000_u64))]
    pub total: Option<u64>,
    /// Ids per callback
    #[arg(long, default_value = "1", value_parser = settings::number(0..=1_000_000_u32))]
    pub ids: u32,
    /// Maximum number of callbacks in flight, each on its own connection
    #[arg(long, default_value = "64", value_parser = settings::number(1..=2_000_usize))]
    pub connections: usize,
    /// Use each id once, counting up from `OBJECT_ID_MIN`; `OBJECT_ID_MAX` is ignored
    #[arg(long)]
    pub unique: bool,
    /// Print the report as one JSON object
    #[arg(long)]
    pub json: bool,
    /// Write the outcome of each callback to this new file, one JSON object per line, as it happens
    #[arg(long, value_name = "FILE")]
    pub ledger: Option<PathBuf>,
}

impl Check for Callbacks {
    fn check(&self) -> Result<(), String> {
        check_order("OBJECT_ID", self.object_id_min, self.object_id_max)
    }

    /// `load --unique` counts up from `OBJECT_ID_MIN`.
    fn is_used(matches: &ArgMatches) -> bool {
        let load = matches.subcommand_matches("load");
        !load.is_some_and(|load| matches!(load.try_get_one("unique"), Ok(Some(true))))
    }
}

impl Check for Partner {
    fn check(&self) -> Result<(), String> {
        check_order("CALLBACK_IDS", self.callback_ids_min, self.callback_ids_max)
    }
}

impl Check for Api {
    fn check(&self) -> Result<(), String> {
        check_order("LATENCY", self.latency_min, self.latency_max)?;
        let Failures {
            fail_500_share,
            fail_429_share,
            fail_hang_share,
            fail_garbage_share,
            fail_wrong_id_share,
        } = self.failures;
        let sum = fail_500_share
            + fail_429_share
            + fail_hang_share
            + fail_garbage_share
            + fail_wrong_id_share;
        if sum > 1.0 + SHARE_TOLERANCE {
            return Err(format!(
                "FAIL_500_SHARE={fail_500_share}, FAIL_429_SHARE={fail_429_share}, \
                 FAIL_HANG_SHARE={fail_hang_share}, FAIL_GARBAGE_SHARE={fail_garbage_share} and \
                 FAIL_WRONG_ID_SHARE={fail_wrong_id_share}: must not be above 1 together"
            ));
        }
        Ok(())
    }
}

/// Checks the values of `<name>_MIN` and `<name>_MAX`.
fn check_order<T: Copy + PartialOrd + Debug>(name: &str, min: T, max: T) -> Result<(), String> {
    if min > max {
        return Err(format!("{name}_MAX={max:?}: must not be below {name}_MIN={min:?}"));
    }
    Ok(())
}

fn endpoint(text: &str) -> Result<Url, String> {
    let mut url = Url::parse(text)
        .ok()
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| "expected a URL such as http://localhost:9090/callback".to_owned())?;
    // The URL parser turns an empty path into "/".
    if url.path() == "/" {
        url.set_path(CALLBACK_PATH);
    }
    Ok(url)
}

fn object_id() -> impl Fn(&str) -> Result<i64, String> + Clone + Send + Sync + 'static {
    settings::number(i64::MIN..=i64::MAX)
}

fn share() -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    settings::number(0.0..=1.0_f64)
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches as _;

    use super::*;

    fn parse(arguments: &[&str]) -> Result<Config, String> {
        let command = Config::augment_args(clap::Command::new("tester"));
        let arguments = std::iter::once("tester").chain(arguments.iter().copied());
        command
            .try_get_matches_from(arguments)
            .and_then(|matches| Config::from_arg_matches(&matches))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_those_of_the_original_tester() {
        let config = parse(&[]).unwrap();
        assert_eq!(config.callbacks.callback_endpoint.as_str(), "http://localhost:9090/callback");
        assert_eq!(config.callbacks.callback_timeout, Duration::from_secs(1));
        assert_eq!((config.callbacks.object_id_min, config.callbacks.object_id_max), (0, 99));
        assert_eq!(config.partner.callback_interval, Duration::from_secs(5));
        assert_eq!((config.partner.callback_ids_min, config.partner.callback_ids_max), (0, 199));
        assert_eq!(config.api.tester_addr.port(), 9010);
        assert_eq!(config.api.latency_min, Duration::from_millis(300));
        assert_eq!(config.api.latency_max, Duration::from_millis(4_300));
        assert!(config.api.online_share.is_none());
    }

    #[test]
    fn endpoint_without_a_path_gets_the_callback_path() {
        let of = |text| endpoint(text).map(String::from);
        assert_eq!(of("http://producer:9090").unwrap(), "http://producer:9090/callback");
        assert_eq!(of("http://producer:9090/").unwrap(), "http://producer:9090/callback");
        assert_eq!(of("http://producer/v2/in").unwrap(), "http://producer/v2/in");
        assert!(of("producer:9090").is_err());
        assert!(of("9090").is_err());
    }

    #[test]
    fn maximum_below_its_minimum_is_rejected_by_name() {
        let error = parse(&["--latency-max=100ms"]).unwrap_err();
        assert!(
            error.contains("LATENCY_MAX=100ms: must not be below LATENCY_MIN=300ms"),
            "{error}"
        );
        let error = parse(&["--object-id-min=100"]).unwrap_err();
        assert!(error.contains("OBJECT_ID_MAX=99: must not be below OBJECT_ID_MIN=100"), "{error}");
        let error = parse(&["--callback-ids-min=200"]).unwrap_err();
        assert!(error.contains("CALLBACK_IDS_MAX=199: must not be below"), "{error}");
    }

    #[test]
    fn latency_of_zero_is_allowed() {
        let config = parse(&["--latency-min=0s", "--latency-max=0s"]).unwrap();
        assert_eq!(config.api.latency_max, Duration::ZERO);
    }

    #[test]
    fn failures_may_add_up_to_one_but_not_to_more() {
        // Summed as floats, these three are 1.0000000000000002.
        let all = ["--fail-500-share=0.34", "--fail-429-share=0.56", "--fail-hang-share=0.1"];
        parse(&all).unwrap();
        let error = parse(&["--fail-500-share=0.6", "--fail-garbage-share=0.5"]).unwrap_err();
        assert!(error.contains("FAIL_500_SHARE=0.6"), "{error}");
        assert!(error.contains("must not be above 1 together"), "{error}");
        assert!(parse(&["--fail-hang-share=1.1"]).is_err());
    }

    #[test]
    fn load_accepts_callback_settings_before_and_after_its_name() {
        for arguments in [
            ["--object-id-max=7", "load", "--callback-endpoint=http://a:1"],
            ["--callback-endpoint=http://a:1", "load", "--object-id-max=7"],
        ] {
            let config = parse(&arguments).unwrap();
            assert_eq!(config.callbacks.object_id_max, 7);
            assert_eq!(config.callbacks.callback_endpoint.as_str(), "http://a:1/callback");
            assert!(matches!(config.command, Some(Command::Load(_))));
        }
    }

    /// Field case 6.12.
    #[test]
    fn load_of_unique_ids_has_no_largest_id() {
        for arguments in [
            &["load", "--unique", "--object-id-min=1000"][..],
            &["--object-id-max=99", "--object-id-min=1000", "load", "--unique"],
        ] {
            assert_eq!(parse(arguments).unwrap().callbacks.object_id_min, 1_000);
        }
        assert!(parse(&["load", "--object-id-min=1000"]).is_err());
    }

    #[test]
    fn disabling_both_simulations_is_rejected() {
        assert!(parse(&["--no-api", "--no-partner"]).is_err());
    }
}
