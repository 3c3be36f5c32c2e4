//! From the command line to the exit code.

use std::future::Ready;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::log_output;
use crate::reload::{self, Reload};
use crate::settings;
use crate::sources::{self, IgnoredSettings, Parsed, Settings, SettingsError, Sources};
use crate::traces::{self, Traces};
use crate::{
    Health, Live, admin, descriptors, healthcheck, http, recorder, telemetry, terminal, time_zone,
};

/// A setting is not allowed (`EX_CONFIG` of sysexits).
const EXIT_SETTINGS: u8 = 78;
/// Another process has what this one needs for itself (`EX_UNAVAILABLE`).
const EXIT_UNAVAILABLE: u8 = 69;
/// The service failed, or was stopped before all in flight was finished (`EX_SOFTWARE`).
const EXIT_FAILURE: u8 = 70;

const DRAIN_DELAY: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_mins(10);
const DRAIN_TIMEOUT: RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_hours(1);

const ABOUT_VARIABLES: &str = "\
    Every option that takes a value can also be set in the settings file, as an environment variable, \
    or in a file .env, under the name in <>; NAME_FILE names a file that holds the value. In the \
    settings file these can change while the process runs:";

/// The admin address serves probes and a scraper, which send their request at once. Clients that do not
/// must not take the connections away from them.
const ADMIN_LIMITS: http::Limits = http::Limits {
    max_connections: 64,
    header_timeout: Duration::from_secs(2),
    idle_timeout: None,
    farewell: Duration::ZERO,
};

/// Signals within this time are one: `timeout` of GNU signals the process and then its group.
const ONE_SIGNAL: Duration = Duration::from_millis(200);

/// What a service is called and where its admin address is by default.
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
    /// The variables of the settings that it heeds while it runs, such as `MAX_CONSUMERS`, by parts.
    pub live: &'static [&'static [&'static str]],
}

impl Description {
    /// The variables of all settings that can change while it runs.
    fn live(&self) -> Vec<&'static str> {
        self.live.iter().copied().chain([telemetry::LIVE]).flatten().copied().collect()
    }
}

/// Settings that every service has.
#[derive(Clone, Debug, Args)]
struct Common {
    /// A file of lines NAME=value, watched: some settings can change while the process runs; SIGHUP has it read at once
    #[arg(long, help_heading = "Life cycle")]
    lastseen_config: Option<PathBuf>,
    /// Where /livez, /readyz and /metrics are served; port 0 takes any free one and logs it
    #[arg(long, value_parser = settings::listen_address, help_heading = "Life cycle")]
    admin_addr: SocketAddr,
    /// How long requests are still taken after SIGTERM, while /readyz says 503 so that a balancer sends no more; ctrl-c skips it
    #[arg(long, value_parser = settings::duration(DRAIN_DELAY), help_heading = "Life cycle")]
    drain_delay: Duration,
    /// How long what is in flight may take to finish after `DRAIN_DELAY`; a second signal ends it at once
    #[arg(long, value_parser = settings::duration(DRAIN_TIMEOUT), default_value = "30s", help_heading = "Life cycle")]
    drain_timeout: Duration,
    #[command(flatten)]
    telemetry: telemetry::Config,
    #[command(flatten)]
    traces: traces::Config,
}

/// What a service or command ends with when something that it needs for itself alone is taken by
/// another process. Whoever started it can tell by the exit code that one is running already.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unavailable(pub String);

/// What a service or command ends with when its settings lead to something that it cannot work with, such
/// as a table with other columns. It is found only while the service runs, but it is a bad setting.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Misconfigured(pub String);

/// What the process is to do, by its settings.
#[derive(Debug)]
pub enum Invocation<S, K> {
    /// A service, which runs until a signal drains it.
    Service(S),
    /// A command, which is over by itself.
    Command(K),
}

/// The whole of a service's `main`: reads its settings, sets up logs, metrics and the admin address,
/// runs it until it ends or a signal drains it, and says how it went by the exit code:
/// 0 for a clean end, 69 if it ended with [`Unavailable`], 70 for another failure or an incomplete
/// drain, 78 for a bad setting. With the command `healthcheck` it asks a service that runs with the same
/// settings whether it is ready, and says so by 0 or 1.
///
/// `run` takes the service's own settings, the [`Health`] to report its peers to, and the token that
/// tells it to drain. While it runs, those settings change that the settings file gives another value;
/// the description says which of them it heeds.
pub fn main<C, R>(
    description: Description,
    run: impl FnOnce(Live<C>, Health, CancellationToken) -> R,
) -> ExitCode
where
    C: Args + FromArgMatches + Clone + Send + Sync + 'static,
    R: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    main_with_commands(description, |config, health, shutdown| {
        Ok(Invocation::<R, Ready<anyhow::Result<()>>>::Service(run(config, health, shutdown)))
    })
}

/// Like [`main`], for a process that is a service or carries out a command, as its settings say.
///
/// A command has neither metrics nor an admin address, and logs warnings only unless told otherwise.
/// A signal tells it to drain as well; what it fails with is printed, and the exit codes are the same.
///
/// `plan` says what is to be done, and may refuse: there are no logs and no runtime before its future
/// is polled, and no address is taken.
pub fn main_with_commands<C, S, K>(
    description: Description,
    plan: impl FnOnce(Live<C>, Health, CancellationToken) -> anyhow::Result<Invocation<S, K>>,
) -> ExitCode
where
    C: Args + FromArgMatches + Clone + Send + Sync + 'static,
    S: Future<Output = anyhow::Result<()>> + Send + 'static,
    K: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let arguments = std::env::args_os().map(|argument| argument.to_string_lossy().into_owned());
    let arguments: Vec<String> = arguments.collect();
    if let Some(admin_address) = is_healthcheck(description, &arguments) {
        return healthcheck::run(admin_address);
    }
    let (sources, content, settings) = match read_settings::<C>(description, arguments) {
        Ok(AtStart { sources, content, parsed: Parsed::Run(settings) }) => {
            (sources, content, settings)
        }
        Ok(AtStart { parsed: Parsed::Print(text), .. }) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("{}: {error}", description.name);
            return ExitCode::from(EXIT_SETTINGS);
        }
    };
    let Settings { config, given, ignored, dot_env, time_zone } = settings;
    let Asked { common, config, healthcheck } = config;
    if healthcheck {
        return healthcheck::run(common.admin_addr);
    }
    if let Some(zone) = time_zone {
        let error = time_zone::apply(&zone);
        eprintln!("{}: cannot start anew with TZ={zone}: {error}", description.name);
        return ExitCode::from(EXIT_FAILURE);
    }
    // Decision: docs/decisions/0020-which-tls-library-do-the-clients-use.md
    // TLS is needed by some settings only, and one provider for all of them keeps the binary small.
    // If there is one already, it is this one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    descriptors::raise_limit();
    let health = Health::default();
    let shutdown = CancellationToken::new();
    let (changer, live) = Live::changeable(config);
    let ended = match plan(live, health.clone(), shutdown.clone()) {
        Ok(Invocation::Service(service)) => {
            let filter = telemetry::init(&common.telemetry);
            log_sources(dot_env, &ignored);
            let heed = move |asked: Asked<C>| {
                filter.set(&asked.common.telemetry);
                changer.set(asked.config);
            };
            let reload = Reload::new(sources, content, (given, ignored), description.live(), heed);
            let supervised = supervise(description, &common, reload, health, shutdown, service);
            let ended = block_on(supervised);
            match &ended {
                Ok(()) => tracing::info!("stopped"),
                Err(error) => tracing::error!("{error:#}"),
            }
            ended
        }
        Ok(Invocation::Command(command)) => {
            telemetry::init(&common.telemetry.of_command());
            log_sources(dot_env, &ignored);
            let ended = block_on(carry_out(command, common.drain_timeout, health, shutdown));
            told(description, ended)
        }
        Err(refused) => told(description, Err(refused)),
    };
    log_output::flush();
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Unavailable>() => ExitCode::from(EXIT_UNAVAILABLE),
        Err(error) if error.is::<Misconfigured>() => ExitCode::from(EXIT_SETTINGS),
        Err(_) => ExitCode::from(EXIT_FAILURE),
    }
}

/// Logs which `.env` was read, and what was set without effect.
fn log_sources(dot_env: Option<(PathBuf, Vec<String>)>, ignored: &IgnoredSettings) {
    if let Some((file, settings)) = dot_env {
        tracing::info!(file = %file.display(), settings = settings.join(", "), "read .env");
    }
    ignored.log();
}

/// Prints the error, if it is one.
fn told(description: Description, ended: anyhow::Result<()>) -> anyhow::Result<()> {
    // After what it has logged.
    log_output::flush();
    ended.inspect_err(|error| eprintln!("{}: {error:#}", description.name))
}

/// What the command line asks for: the service's own settings with those of every service, and whether
/// only to look how such a service does.
struct Asked<C> {
    common: Common,
    config: C,
    healthcheck: bool,
}

impl<C: FromArgMatches> FromArgMatches for Asked<C> {
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

/// The settings as they are at the start, and where they came from.
struct AtStart<C> {
    sources: Sources,
    /// Of the settings file.
    content: String,
    parsed: Parsed<C>,
}

fn read_settings<C: Args + FromArgMatches>(
    description: Description,
    arguments: Vec<String>,
) -> Result<AtStart<Asked<C>>, SettingsError> {
    let command = Common::augment_args(C::augment_args(Command::new(description.name)))
        .version(env!("CARGO_PKG_VERSION"))
        // Set after the settings, whose own doc comments would stand here otherwise.
        .about(description.about)
        .long_about(None)
        .after_help(format!("{ABOUT_VARIABLES} {}.", description.live().join(", ")))
        .args_override_self(true)
        .subcommand(Command::new(healthcheck::NAME).about(healthcheck::ABOUT));
    let command = with_admin_address(command, description).mut_arg("drain_delay", |argument| {
        argument.required(false).default_value(description.drain_delay)
    });
    let sources = Sources::new(command, arguments)?;
    let content = sources.file().map_or(Ok(String::new()), sources::read_file)?;
    let parsed = sources.read(&content)?;
    Ok(AtStart { sources, content, parsed })
}

/// The admin address of the service whose health is asked for, if that is all that the command line says.
/// No other setting is looked at: a settings file that a service refuses while it runs is no reason to end it.
fn is_healthcheck(description: Description, arguments: &[String]) -> Option<SocketAddr> {
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
    // With a file that holds no settings at all, it is still the service's environment that says where.
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

/// Runs `future` on a runtime of its own, and leaves behind what it has abandoned there.
fn block_on(future: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let runtime = Runtime::new().context("cannot start the runtime")?;
    let ended = runtime.block_on(future);
    // Tasks that are still there belong to what was abandoned; waiting for them could take forever.
    runtime.shutdown_background();
    ended
}

/// Runs the service beside its admin address until it ends or has to be abandoned.
async fn supervise(
    description: Description,
    common: &Common,
    reload: Option<Reload<impl FromArgMatches + Send + 'static>>,
    health: Health,
    shutdown: CancellationToken,
    service: impl Future<Output = anyhow::Result<()>> + Send + 'static,
) -> anyhow::Result<()> {
    // First of all: until then, a signal ends the process where it stands.
    let signals = Signals::watch()?;
    let metrics = recorder::install(description.name)?;
    let reload = reload::watch(reload, Arc::clone(&signals.hangups), &health);
    let traces = Traces::start(&common.traces, description.name);
    let address = common.admin_addr;
    let listener =
        http::listen(address).with_context(|| format!("cannot listen on ADMIN_ADDR={address}"))?;
    let address = listener.local_addr().context("cannot tell the admin address")?;
    tracing::info!(service = description.name, admin = %address, "starting");
    let router = admin::router(description.name, health.clone(), metrics.clone());
    let stop =
        Stop { delay: common.drain_delay, drain_timeout: common.drain_timeout, health, shutdown };
    // It goes on while the service drains, so that a probe sees why it is not ready.
    let admin = http::serve(listener, router, ADMIN_LIMITS, CancellationToken::new());
    let admin = tokio::spawn(async move {
        tokio::join!(admin, recorder::upkeep(metrics));
    });
    let ended = tokio::select! {
        ended = run_until_abandoned(service, signals, stop) => ended,
        ended = admin => Err(anyhow::anyhow!("the admin address died: {ended:?}")),
        never = reload => match never {},
    };
    traces.finish().await;
    ended
}

/// Runs the command, with nothing beside it, until it ends or has to be abandoned.
async fn carry_out(
    command: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    drain_timeout: Duration,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let signals = Signals::watch()?;
    let stop = Stop { delay: Duration::ZERO, drain_timeout, health, shutdown };
    run_until_abandoned(command, signals, stop).await
}

/// What a signal starts.
struct Stop {
    /// Between "not ready" and the drain.
    delay: Duration,
    drain_timeout: Duration,
    health: Health,
    shutdown: CancellationToken,
}

async fn run_until_abandoned(
    work: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    signals: Signals,
    stop: Stop,
) -> anyhow::Result<()> {
    // As a task of its own, so that a panic in it is an error here and not the end of this function.
    let work = tokio::spawn(work);
    tokio::select! {
        ended = work => ended.context("died")?,
        reason = abandoned(signals, stop) => reason,
    }
}

const SIGTERM: &str = "SIGTERM";

/// The signals that stop a service or command.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// Whether there was a terminal that can hang up.
    had_terminal: bool,
    /// SIGHUP without that asks for the settings to be read again.
    hangups: Arc<Notify>,
}

impl Signals {
    fn watch() -> anyhow::Result<Self> {
        let terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
        let interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
        let hangup = signal(SignalKind::hangup()).context("cannot watch for SIGHUP")?;
        let had_terminal = terminal::is_there();
        Ok(Self { terminate, interrupt, hangup, had_terminal, hangups: Arc::default() })
    }

    /// Waits for the next of them and gives its name.
    async fn next(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return SIGTERM,
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hangup.recv() => {
                    if self.had_terminal && !terminal::is_there() {
                        return "SIGHUP";
                    }
                    self.hangups.notify_one();
                }
            }
        }
    }
}

// Decision: docs/decisions/0009-how-does-a-server-stop-without-losing-requests.md
/// Waits for the first signal, starts the drain, and returns the reason to give it up.
async fn abandoned(mut signals: Signals, stop: Stop) -> anyhow::Result<()> {
    let Stop { delay, drain_timeout, health, shutdown } = stop;
    let name = signals.next().await;
    let first = Instant::now();
    // A balancer that still sends requests here finds nobody after the drain. An operator at a terminal
    // does not want to wait, and no balancer is told anything by ctrl-c.
    let delay = if name == SIGTERM { delay } else { Duration::ZERO };
    let drained = async {
        health.drain();
        if !delay.is_zero() {
            tracing::info!(signal = name, ?delay, "not ready any more; requests are still taken");
            sleep(delay).await;
        }
        tracing::info!(signal = name, timeout = ?drain_timeout, "draining");
        shutdown.cancel();
        sleep(drain_timeout).await;
    };
    let second = async {
        loop {
            let name = signals.next().await;
            if first.elapsed() >= ONE_SIGNAL {
                return name;
            }
        }
    };
    tokio::select! {
        () = drained => anyhow::bail!(
            "the drain took longer than DRAIN_TIMEOUT={drain_timeout:?}; what was in flight is left unfinished"
        ),
        name = second => anyhow::bail!("stopped at once by a second signal ({name})"),
    }
}
