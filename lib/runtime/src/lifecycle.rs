//! The life cycle of a process, from its command line to its exit code.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

use crate::log_output;
use crate::reload::{self, Reload};
use crate::settings;
use crate::signals::{Shutdown, Signals, Work, run_until_stopped};
use crate::sources::{self, IgnoredSettings, Parsed, Settings, SettingsError, Sources};
use crate::traces::{self, Traces};
use crate::{
    Context, Reloadable, admin, descriptors, healthcheck, http, recorder, telemetry, time_zone,
};

/// A setting is not allowed (`EX_CONFIG` of sysexits).
const EXIT_SETTINGS: u8 = 78;
/// Another process holds a resource that this one needs exclusively (`EX_UNAVAILABLE`).
const EXIT_UNAVAILABLE: u8 = 69;
/// The service failed, or stopped before it had finished the work in flight (`EX_SOFTWARE`).
const EXIT_FAILURE: u8 = 70;

const DRAIN_DELAY: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_mins(10);
const DRAIN_TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_hours(1);

const ABOUT_VARIABLES: &str = "\
    Every option that takes a value can also be set in the settings file, as an environment \
    variable, or in a file .env, under the name in <>; NAME_FILE names a file that holds the value. \
    In the settings file, these settings can change while the process runs:";

/// The limits at the admin address. Health probes and Prometheus send their request at once; slower
/// clients must not use up the connections.
const ADMIN_LIMITS: http::Limits = http::Limits {
    max_connections: 64,
    header_timeout: Duration::from_secs(2),
    idle_timeout: None,
    quiet_period: Duration::ZERO,
};

/// The name of a service and the defaults of its common settings.
#[derive(Clone, Copy, Debug)]
pub struct Description {
    /// The binary's name, also the `service` label of `lastseen_build_info`.
    pub name: &'static str,
    /// One sentence for `--help`.
    pub about: &'static str,
    /// The default of `ADMIN_ADDR`, such as `:9091`.
    pub admin_address: &'static str,
    /// The default of `DRAIN_DELAY`: `0s` for a service to which no balancer sends requests.
    pub drain_delay: &'static str,
    /// The variables of the reloadable settings, such as `MAX_CONSUMERS`; one list for each role.
    pub reloadable: &'static [&'static [&'static str]],
}

impl Description {
    /// The variables of all reloadable settings, including the settings that every process has.
    fn reloadable(&self) -> Vec<&'static str> {
        self.reloadable.iter().copied().chain([telemetry::RELOADABLE]).flatten().copied().collect()
    }
}

/// Settings that every service has.
#[derive(Clone, Debug, Args)]
struct Common {
    /// A file of NAME=value lines. Changes of reloadable settings take effect while the process
    /// runs; SIGHUP rereads the file at once
    #[arg(long, help_heading = "Life cycle")]
    lastseen_config: Option<PathBuf>,
    /// Address of /livez, /readyz and /metrics; port 0 takes any free one and logs it
    #[arg(long, value_parser = settings::listen_address, help_heading = "Life cycle")]
    admin_addr: SocketAddr,
    /// How long to accept requests after SIGTERM, while /readyz returns 503 so that balancers stop
    /// sending them; ctrl-c skips this
    #[arg(long, value_parser = settings::duration(DRAIN_DELAY), help_heading = "Life cycle")]
    drain_delay: Duration,
    /// How long work in flight may take to finish after `DRAIN_DELAY`; a second signal stops the
    /// process at once
    #[arg(long, value_parser = settings::duration(DRAIN_TIMEOUT), default_value = "30s", help_heading = "Life cycle")]
    drain_timeout: Duration,
    #[command(flatten)]
    telemetry: telemetry::Config,
    #[command(flatten)]
    traces: traces::Config,
}

/// The error of a service or command that needs a resource exclusively while another process holds
/// it. From the exit code, a service manager such as systemd sees that another instance is running.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unavailable(pub String);

/// The error of a service or command whose settings refer to something unusable, such as a table
/// with other columns. The problem is found at run time, but counts as a bad setting.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misconfigured(pub String);

/// What the process does, according to its settings.
pub struct Invocation {
    is_service: bool,
    work: Work,
}

impl Invocation {
    /// A service, which runs until a signal drains it.
    pub fn service(work: impl Future<Output = anyhow::Result<()>> + Send + 'static) -> Self {
        Self { is_service: true, work: Box::pin(work) }
    }

    /// A command, which ends by itself.
    pub fn command(work: impl Future<Output = anyhow::Result<()>> + Send + 'static) -> Self {
        Self { is_service: false, work: Box::pin(work) }
    }
}

/// The complete `main` of a service: reads its settings, sets up logs, metrics and the admin
/// address, and runs the service until it ends or a signal drains it. The exit code is 0 for a
/// clean end, 69 for [`Unavailable`], 70 for another failure or an incomplete drain, and 78 for a
/// bad setting. The command `healthcheck` instead checks whether a service that runs with the same
/// settings is ready, and exits with 0 or 1.
///
/// `run` takes the service's own settings, and the [`Context`] of the process. The settings change
/// with the settings file; the service applies those that `description` lists as reloadable.
pub fn main<C, R>(
    description: Description,
    run: impl FnOnce(Reloadable<C>, Context) -> R,
) -> ExitCode
where
    C: Args + FromArgMatches + Clone + Send + Sync + 'static,
    R: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    main_with_commands(description, |config, context| Ok(Invocation::service(run(config, context))))
}

/// Like [`main`], for a process that runs either a service or a command, depending on its settings.
///
/// A command has neither metrics nor an admin address, and by default logs only warnings. A signal
/// drains it too. Its error is printed, and the exit codes are the same.
///
/// `plan` chooses what to run, or rejects the settings. It runs before logs and the runtime exist
/// and before any address is bound.
pub fn main_with_commands<C>(
    description: Description,
    plan: impl FnOnce(Reloadable<C>, Context) -> anyhow::Result<Invocation>,
) -> ExitCode
where
    C: Args + FromArgMatches + Clone + Send + Sync + 'static,
{
    let arguments = arguments(description);
    if let Some(admin_address) = healthcheck_address(description, &arguments) {
        return healthcheck::run(admin_address);
    }
    let (sources, file_content, settings) = match read_settings::<C>(description, arguments) {
        Ok((sources, content, Parsed::Run(settings))) => (sources, content, settings),
        Ok((_, _, Parsed::Print(text))) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{}: {error}", description.name);
            return ExitCode::from(EXIT_SETTINGS);
        }
    };
    let Settings { config, values, ignored, dot_env, time_zone } = settings;
    let ParsedArgs { common, config, healthcheck } = config;
    if healthcheck {
        return healthcheck::run(common.admin_addr);
    }
    if let Some(zone) = time_zone {
        let error = time_zone::apply(&zone);
        eprintln!("{}: cannot restart with TZ={zone}: {error}", description.name);
        return ExitCode::from(EXIT_FAILURE);
    }
    // Decision: docs/decisions/0020-which-tls-library-do-the-clients-use.md
    // Only some settings need TLS. One provider for all TLS clients keeps the binary small. The
    // call fails only if this provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    descriptors::raise_limit();
    let context = Context::default();
    let (reload_handle, config) = Reloadable::with_handle(config);
    let result = match plan(config, context.clone()) {
        Ok(Invocation { is_service: true, work }) => {
            let filter = telemetry::init(&common.telemetry);
            log_sources(dot_env, &ignored);
            let publish = move |args: ParsedArgs<C>| {
                filter.set(&args.common.telemetry);
                reload_handle.set(args.config);
            };
            let reload = Reload::new(
                sources,
                file_content,
                (values, ignored),
                description.reloadable(),
                publish,
            );
            let result = block_on(run_service(description, &common, reload, context, work));
            match &result {
                Ok(()) => tracing::info!("stopped"),
                Err(error) => tracing::error!("{error:#}"),
            }
            result
        }
        Ok(Invocation { is_service: false, work }) => {
            telemetry::init(&common.telemetry.of_command());
            log_sources(dot_env, &ignored);
            let result = block_on(run_command(work, common.drain_timeout, context));
            print_error(description, result)
        }
        Err(error) => print_error(description, Err(error)),
    };
    log_output::flush();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Unavailable>() => ExitCode::from(EXIT_UNAVAILABLE),
        Err(error) if error.is::<Misconfigured>() => ExitCode::from(EXIT_SETTINGS),
        Err(_) => ExitCode::from(EXIT_FAILURE),
    }
}

/// The command line, without its first argument if that is the name of the service. For example,
/// `lastseen producer` selects the service `producer`.
fn arguments(description: Description) -> Vec<String> {
    let arguments = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned());
    let mut arguments: Vec<String> = arguments.collect();
    if arguments.get(1).is_some_and(|first| first == description.name) {
        arguments.remove(1);
    }
    arguments
}

/// Logs which `.env` was read, and which settings have no effect.
fn log_sources(dot_env: Option<(PathBuf, Vec<String>)>, ignored: &IgnoredSettings) {
    if let Some((file, settings)) = dot_env {
        tracing::info!(file = %file.display(), settings = settings.join(", "), "read .env");
    }
    ignored.log();
}

fn print_error(description: Description, result: anyhow::Result<()>) -> anyhow::Result<()> {
    // The log lines that led to the error are written first.
    log_output::flush();
    result.inspect_err(|error| eprintln!("{}: {error:#}", description.name))
}

/// The parsed command line: the common settings, the service's own settings, and whether it
/// contains the command `healthcheck`.
struct ParsedArgs<C> {
    common: Common,
    config: C,
    healthcheck: bool,
}

impl<C: FromArgMatches> FromArgMatches for ParsedArgs<C> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let common = Common::from_arg_matches(matches)?;
        let config = C::from_arg_matches(matches)?;
        let healthcheck = matches.subcommand_name() == Some(healthcheck::NAME);
        Ok(Self { common, config, healthcheck })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Returns the sources of the settings, the content of the settings file, and the settings.
fn read_settings<C: Args + FromArgMatches>(
    description: Description,
    arguments: Vec<String>,
) -> Result<(Sources, String, Parsed<ParsedArgs<C>>), SettingsError> {
    let command = Common::augment_args(C::augment_args(Command::new(description.name)))
        .version(env!("CARGO_PKG_VERSION"))
        // Set last, because clap would replace it by the doc comment of a settings struct.
        .about(description.about)
        .long_about(None)
        .after_help(format!("{ABOUT_VARIABLES} {}.", description.reloadable().join(", ")))
        .args_override_self(true)
        .subcommand(Command::new(healthcheck::NAME).about(healthcheck::ABOUT));
    let command = with_admin_address(command, description).mut_arg("drain_delay", |argument| {
        argument.required(false).default_value(description.drain_delay)
    });
    let sources = Sources::new(command, arguments)?;
    let content = sources.file().map_or(Ok(String::new()), sources::read_file)?;
    let parsed = sources.read(&content)?;
    Ok((sources, content, parsed))
}

/// The admin address to check, if the command line contains only `healthcheck` and settings of that
/// address. Other settings are not validated: a running service rejects a bad settings file and
/// stays healthy, so a bad file must not make the check fail.
fn healthcheck_address(description: Description, arguments: &[String]) -> Option<SocketAddr> {
    #[derive(Args)]
    struct Address {
        #[arg(long, value_parser = settings::listen_address)]
        admin_addr: SocketAddr,
        #[arg(long)]
        lastseen_config: Option<PathBuf>,
    }
    if !arguments.iter().any(|argument| argument == healthcheck::NAME) {
        return None;
    }
    let command = Address::augment_args(Command::new(description.name))
        .args_override_self(true)
        .subcommand(Command::new(healthcheck::NAME))
        .subcommand_required(true);
    let sources =
        Sources::new(with_admin_address(command, description), arguments.to_vec()).ok()?;
    let content = sources.file().map_or(Ok(String::new()), sources::read_file).unwrap_or_default();
    // If the file cannot be parsed, the address in the service's environment still applies.
    match sources.read::<Address>(&content).or_else(|_| sources.read("")) {
        Ok(Parsed::Run(settings)) => Some(settings.config.admin_addr),
        Ok(Parsed::Print(_)) | Err(_) => None,
    }
}

fn with_admin_address(command: Command, description: Description) -> Command {
    command.mut_arg("admin_addr", |argument| {
        argument.required(false).default_value(description.admin_address)
    })
}

/// Runs `future` on a new tokio runtime. Does not wait for tokio tasks that `future` has left
/// running.
fn block_on(future: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = Runtime::new().context("cannot start the runtime")?;
    let result = runtime.block_on(future);
    // The remaining tokio tasks belong to abandoned work; waiting for them could take forever.
    runtime.shutdown_background();
    result
}

/// Runs the service and its admin address until the service ends or is abandoned.
async fn run_service(
    description: Description,
    common: &Common,
    reload: Option<Reload<impl FromArgMatches + Send + 'static>>,
    context: Context,
    service: Work,
) -> anyhow::Result<()> {
    // Must come first, because a signal that arrives earlier kills the process.
    let signals = Signals::watch()?;
    recorder::install(description.name)?;
    let reload = reload::watch(reload, Arc::clone(&signals.reload_requests), &context.health);
    let traces = Traces::start(&common.traces, description.name);
    let address = common.admin_addr;
    let listener =
        http::listen(address).with_context(|| format!("cannot listen on ADMIN_ADDR={address}"))?;
    let address = listener.local_addr().context("cannot read the admin address")?;
    tracing::info!(service = description.name, admin = %address, "starting");
    let router = admin::router(description.name, context.health.clone());
    let Common { drain_delay, drain_timeout, .. } = *common;
    let shutdown = Shutdown { drain_delay, drain_timeout };
    // The admin server is never shut down: while the service drains, `/readyz` still reports why it
    // is not ready.
    let admin = http::serve(listener, router, ADMIN_LIMITS, CancellationToken::new());
    let _admin = context.supervisor.spawn_critical("admin server", admin);
    let result = tokio::select! {
        result = run_until_stopped(service, context, signals, shutdown) => result,
        never = reload => match never {},
    };
    traces.finish().await;
    result
}

/// Runs the command until it ends or is abandoned.
async fn run_command(
    command: Work,
    drain_timeout: Duration,
    context: Context,
) -> anyhow::Result<()> {
    let signals = Signals::watch()?;
    let shutdown = Shutdown { drain_delay: Duration::ZERO, drain_timeout };
    run_until_stopped(command, context, signals, shutdown).await
}
