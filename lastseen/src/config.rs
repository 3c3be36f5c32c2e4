//! The settings of `lastseen`: those of all roles, and the locations of the queue and the table.

use std::path::PathBuf;

use clap::{Arg, Args, Subcommand};
use messaging::queue::{BrokerUrl, QueueConfig};
use runtime::authenticity::Authenticity;
use runtime::settings::{Check, Checked};
use store::{DatabaseUrl, Retention, TimeZone};

use crate::{dead_letters, groups, history, migrate, objects};

/// The default of [`consumer::Lookups::tester_endpoint`]. Another value means that the user has
/// configured a status API.
const DEFAULT_TESTER_ENDPOINT: &str = "http://localhost:9010/";

/// The settings of `lastseen`.
#[derive(Clone, Debug, Args)]
#[group(skip)]
#[command(next_help_heading = "Lastseen", mut_args(adapt_to_commands))]
#[expect(missing_docs, reason = "documented at their types; text here would replace the help's")]
pub struct Config {
    /// Directory of queue.db, store.db, viewer.snapshot and groups.cache (the queue, the table, and
    /// what the viewer saves for its next start); created if it does not exist
    #[arg(long, global = true, default_value = "./data")]
    pub lastseen_dir: PathBuf,
    /// RabbitMQ to use instead of queue.db, as amqp://USER:PASSWORD@HOST:PORT/VHOST or amqps://…;
    /// or sqlite:PATH
    #[arg(long, global = true)]
    pub amqp_uri: Option<BrokerUrl>,
    /// Postgres to use instead of store.db, as postgres://USER:PASSWORD@HOST:PORT/DB?sslmode=…,
    /// where several HOST:PORT may be listed; or sqlite:PATH
    #[arg(long, global = true)]
    pub database_url: Option<DatabaseUrl>,
    /// Time zone of the log and of a Postgres column `last_seen` without time zone, as in the Go
    /// services' table, such as Europe/Berlin [default: the machine's]
    #[arg(long, global = true)]
    pub tz: Option<TimeZone>,
    /// How long the history is kept.
    #[command(flatten)]
    pub history: Retention,
    #[command(flatten)]
    pub without: Without,
    #[command(flatten)]
    pub queue: QueueConfig,
    #[command(flatten)]
    pub callbacks: producer::Callbacks,
    /// Whether callbacks must be signed. The simulated partner then signs its own.
    #[command(flatten)]
    pub authenticity: Authenticity,
    #[command(flatten)]
    pub lookups: consumer::Lookups,
    #[command(flatten)]
    pub cleanup: routine::Cleanup,
    #[command(flatten)]
    pub view: viewer::View,
    #[command(flatten)]
    pub groups: viewer::GroupsConfig,
    #[command(flatten)]
    pub partner_callbacks: Checked<tester::config::Callbacks>,
    #[command(flatten)]
    pub partner: Checked<tester::config::Partner>,
    #[command(flatten)]
    pub api: Checked<tester::config::Api>,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Makes the settings that `lastseen`'s commands use global. Those that the tester makes global for
/// its command `load` become local, because `lastseen` has no such command.
fn adapt_to_commands(setting: Arg) -> Arg {
    match setting.get_id().as_str() {
        "object_ttl" | "groups_file" | "groups_weights" => setting.global(true),
        "callback_endpoint" | "callback_secret" | "callback_timeout" | "object_id_min"
        | "object_id_max" => setting.global(false),
        _ => setting,
    }
}

/// The roles to leave out.
#[derive(Clone, Copy, Debug, Args)]
#[group(skip)]
#[command(next_help_heading = "Roles to leave out")]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct Without {
    /// Accept no callbacks
    #[arg(long)]
    pub no_producer: bool,
    /// Look up no objects
    #[arg(long)]
    pub no_consumer: bool,
    /// Delete no stale objects
    #[arg(long)]
    pub no_routine: bool,
    /// Serve neither the page nor the API that show which objects are online
    #[arg(long)]
    pub no_viewer: bool,
    /// Simulate neither the partner nor the status API; lookups go to `TESTER_ENDPOINT`
    #[arg(long)]
    pub no_tester: bool,
    /// Do not simulate the partner, which posts callbacks
    #[arg(long)]
    pub no_partner: bool,
    /// Do not simulate the status API; lookups go to `TESTER_ENDPOINT`
    #[arg(long)]
    pub no_api: bool,
}

impl Check for Config {
    fn check(&self) -> Result<(), String> {
        if matches!(self.command, Some(Command::Migrate(_))) && self.database_url.is_none() {
            return Err("DATABASE_URL must be set: it names the Postgres to migrate".to_owned());
        }
        if matches!(self.command, Some(Command::Groups(_))) && self.groups.groups_file.is_none() {
            let reason = "GROUPS_FILE must be set: it names the file or the directory that defines \
                          the groups";
            return Err(reason.to_owned());
        }
        // A command runs no role and uses no status API.
        if self.command.is_some() {
            return Ok(());
        }
        let Without { no_producer, no_consumer, no_routine, no_viewer, .. } = self.without;
        let (no_api, no_partner) = (self.without.api(), self.without.partner());
        let only_testers = no_producer && no_consumer && no_routine && no_viewer;
        if only_testers && no_api && no_partner {
            return Err(
                "the flags --no-… leave no role to run: remove one of these flags".to_owned()
            );
        }
        // The value is not shown, since it may hold a password.
        let has_endpoint = self.lookups.tester_endpoint.as_str() != DEFAULT_TESTER_ENDPOINT;
        if !no_consumer && !no_api && has_endpoint {
            let reason = "TESTER_ENDPOINT is set, but lookups would go to the simulated status API: \
                          add --no-tester or --no-api, or remove TESTER_ENDPOINT";
            return Err(reason.to_owned());
        }
        self.broker().check()
    }
}

impl Without {
    pub(crate) fn api(self) -> bool {
        self.no_tester || self.no_api
    }

    pub(crate) fn partner(self) -> bool {
        self.no_tester || self.no_partner
    }
}

/// The commands of `lastseen`. They work whether or not the pipeline is running.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// List the objects that are online: those seen within `OBJECT_TTL`
    Objects(objects::List),
    /// Show when an object was online
    History(history::Show),
    /// Print each time that an object came online or was gone, in order and without gaps
    Changes(history::Feed),
    /// Show which groups of objects are up, as computed from `GROUPS_FILE`, the table and the
    /// history
    ///
    /// In contrast to the viewer, the command shows a worse status even if it has not lasted for
    /// the group's time `for` yet. It cannot know which objects were given up, and shows them as
    /// never seen or gone.
    Groups(groups::Show),
    /// List dead letters (messages that Lastseen gave up on), send them back, or delete them
    #[command(arg_required_else_help = false)]
    DeadLetters {
        /// What to do with dead letters.
        #[command(subcommand)]
        command: dead_letters::Command,
    },
    /// Create the table in Postgres, and recreate it whenever it disappears, until a signal
    /// arrives; for services whose database roles may not create it
    Migrate(migrate::Migrate),
}

impl Config {
    /// The queue that `AMQP_URI` names, or else the file in the directory.
    #[must_use]
    pub fn broker(&self) -> messaging::queue::Config {
        let url = self.amqp_uri.clone();
        let amqp_uri = url.unwrap_or_else(|| BrokerUrl::file(self.lastseen_dir.join("queue.db")));
        messaging::queue::Config { amqp_uri, queue: self.queue.clone() }
    }

    /// The table that `DATABASE_URL` names, or else the file in the directory.
    #[must_use]
    pub fn store(&self) -> store::Config {
        let (tz, history) = (self.tz.clone(), self.history);
        store::Config { tz, history, ..store::Config::at(self.table()) }
    }

    pub(crate) fn table(&self) -> DatabaseUrl {
        let url = self.database_url.clone();
        url.unwrap_or_else(|| DatabaseUrl::file(self.lastseen_dir.join("store.db")))
    }
}

#[cfg(test)]
mod tests {
    use std::any::TypeId;
    use std::num::NonZeroU32;

    use clap::{Arg, Args as _, Command, FromArgMatches as _};
    use runtime::settings::Checked;

    use super::Config;

    /// Field case 2.8. A duration is recognised by its default value.
    #[test]
    fn every_duration_of_every_role_has_a_range() {
        let command = Config::augment_args(Command::new("lastseen"));
        let is_duration = |value: &str| {
            let units = ["ms", "s", "m", "h", "d"];
            let number = units.iter().find_map(|unit| value.strip_suffix(unit));
            number.is_some_and(|number| number.parse::<u64>().is_ok())
        };
        let mut durations = Vec::new();
        for argument in command.get_arguments() {
            let default = argument.get_default_values().first().and_then(|value| value.to_str());
            if let (Some(flag), Some(true)) = (argument.get_long(), default.map(is_duration)) {
                durations.push(flag);
            }
        }
        assert!(durations.len() >= 11, "{durations:?}");
        for flag in durations {
            // The simulated status API's latency may be zero.
            let tiny = if flag.starts_with("latency-") { "-1ns" } else { "1ns" };
            for value in [tiny, "5M", "1month", "1y", "10000d", "-1s", "30"] {
                let arguments = ["lastseen".to_owned(), format!("--{flag}={value}")];
                let error = command.clone().try_get_matches_from(arguments).unwrap_err();
                let reason = std::error::Error::source(&error).map(ToString::to_string);
                let is_range = reason.is_some_and(|reason| reason.contains("a duration from "));
                assert!(is_range, "--{flag}={value}: {error}");
            }
        }
    }

    #[test]
    fn every_number_of_every_role_is_rejected_with_its_range() {
        let lastseen = Config::augment_args(Command::new("lastseen"));
        let tester = tester::config::Config::augment_args(Command::new("tester"));
        let mut numbers = 0;
        for command in [lastseen, tester] {
            for subcommand in all_with_subcommands(&command) {
                for argument in subcommand.get_arguments().filter(|argument| is_number(argument)) {
                    numbers += 1;
                    let flag = argument.get_long().map(|flag| format!("--{flag}="));
                    let flag = flag.unwrap_or_default();
                    let single = Command::new("x").arg(argument.clone());
                    for value in ["abc", "4x", "", "1.5.1"] {
                        let arguments = ["x".to_owned(), format!("{flag}{value}")];
                        let error = single.clone().try_get_matches_from(arguments).unwrap_err();
                        let reason = std::error::Error::source(&error).map(ToString::to_string);
                        let is_range = reason.is_some_and(|reason| reason.contains("number from "));
                        assert!(is_range, "{flag}{value}: {error}");
                    }
                }
            }
        }
        assert!(numbers >= 30, "{numbers}");
    }

    fn all_with_subcommands(command: &Command) -> Vec<&Command> {
        let below = command.get_subcommands().flat_map(all_with_subcommands);
        std::iter::once(command).chain(below).collect()
    }

    fn is_number(argument: &Arg) -> bool {
        let of_value = argument.get_value_parser().type_id();
        let integers = [TypeId::of::<u8>(), TypeId::of::<u16>(), TypeId::of::<u32>()];
        let long = [TypeId::of::<u64>(), TypeId::of::<usize>(), TypeId::of::<i64>()];
        let others = [TypeId::of::<f64>(), TypeId::of::<NonZeroU32>()];
        integers.into_iter().chain(long).chain(others).any(|number| of_value == number)
    }

    #[test]
    fn shards_of_a_queue_in_a_file_are_rejected() {
        let parse = |flags: &[&str]| {
            let command = Checked::<Config>::augment_args(Command::new("lastseen"));
            let matches = command.try_get_matches_from([&["lastseen"], flags].concat()).unwrap();
            let config = Checked::<Config>::from_arg_matches(&matches);
            config.map(drop).map_err(|error| error.to_string())
        };
        for flags in [&["--shards=4"][..], &["--shards=4", "--amqp-uri=sqlite:q.db"]] {
            let error = parse(flags).unwrap_err();
            assert!(error.contains("SHARDS=4: expected 1, because a queue in a file"), "{error}");
        }
        assert_eq!(parse(&["--shards=1"]), Ok(()));
        assert_eq!(parse(&["--shards=4", "--amqp-uri=amqp://a"]), Ok(()));
    }
}
