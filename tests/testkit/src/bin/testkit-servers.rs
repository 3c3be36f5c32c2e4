//! Runs a command with a RabbitMQ and a Postgres. `scripts/with-servers` calls it once it has
//! installed the servers.

use std::ffi::OsString;
use std::io::{self, ErrorKind, IsTerminal as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::panic::{self, AssertUnwindSafe};
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Parser;
use rustix::process::{Pid, Signal, kill_process};
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use testkit::{PostgresCluster, RabbitNode};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};
use url::Url;

const AMQP_URI: &str = "TEST_AMQP_URI";
const DATABASE_URL: &str = "TEST_DATABASE_URL";
const LOGIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the command may run after a signal was forwarded to it.
const STOP_DEADLINE: Duration = Duration::from_secs(10);

/// Runs COMMAND with a RabbitMQ and a Postgres, and ends with its exit code
///
/// `TEST_AMQP_URI` and `TEST_DATABASE_URL` name the servers to COMMAND. If such a variable is
/// already set, its server is only checked; otherwise a private one runs until COMMAND has ended.
#[derive(Debug, Parser)]
struct Arguments {
    /// Bash command to run at the end, even if COMMAND could not be started
    #[arg(long, value_name = "SCRIPT")]
    finally: Option<String>,
    /// Command to run, and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    testkit::install_tls();
    // testkit reports by a panic that it cannot start a server.
    panic::set_hook(Box::new(|panic| {
        say(panic.payload_as_str().unwrap_or("a server could not be started"));
    }));
    let ended = panic::catch_unwind(AssertUnwindSafe(|| {
        let ended = tokio::runtime::Runtime::new()?.block_on(run(&arguments.command));
        ended.inspect_err(|error| say(&format!("{error:#}")))
    }));
    if let Some(script) = arguments.finally
        && let Err(error) = std::process::Command::new("bash").args(["-c", &script]).status()
    {
        say(&format!("cannot run {script:?}: {error}"));
    }
    match ended {
        Ok(Ok(status)) => end_like(status),
        Ok(Err(_)) | Err(_) => ExitCode::FAILURE,
    }
}

/// Runs the command between the start and the stop of the servers.
async fn run(command: &[OsString]) -> anyhow::Result<ExitStatus> {
    let mut signals = stop_signals().context("cannot receive signals")?;
    let servers = tokio::select! {
        servers = Servers::find() => servers?,
        Some(signal) = signals.recv() => return Ok(ExitStatus::from_raw(signal.as_raw())),
    };
    let (program, arguments) = command.split_first().context("there is no command")?;
    let child = Command::new(program)
        .args(arguments)
        .env(AMQP_URI, &servers.amqp_uri)
        .env(DATABASE_URL, &servers.database_url)
        .spawn();
    match child {
        Ok(child) => wait(child, signals).await.context("cannot wait for the command"),
        Err(error) => {
            say(&format!("cannot run {}: {error}", program.display()));
            // The exit codes of a shell.
            let code = if error.kind() == ErrorKind::NotFound { 127 } else { 126 };
            Ok(ExitStatus::from_raw(code << 8))
        }
    }
}

/// The servers of the command. Private ones are stopped on drop, and when this process is killed.
struct Servers {
    amqp_uri: String,
    database_url: String,
    _broker: Option<RabbitNode>,
    _database: Option<PostgresCluster>,
}

impl Servers {
    async fn find() -> anyhow::Result<Self> {
        let ((amqp_uri, broker), (database_url, database)) =
            tokio::try_join!(find_broker(), find_database())?;
        say(&format!("{AMQP_URI}={}", mask(&amqp_uri)));
        say(&format!("{DATABASE_URL}={}", mask(&database_url)));
        Ok(Self { amqp_uri, database_url, _broker: broker, _database: database })
    }
}

async fn find_broker() -> anyhow::Result<(String, Option<RabbitNode>)> {
    if let Some(uri) = variable(AMQP_URI) {
        return match testkit::connect(&uri).await {
            Ok(_) => Ok((uri, None)),
            Err(reason) => bail!("cannot use RabbitMQ at {AMQP_URI}={}: {reason}", mask(&uri)),
        };
    }
    say("starting a private RabbitMQ");
    let node = RabbitNode::start().await;
    Ok((node.amqp_uri(), Some(node)))
}

async fn find_database() -> anyhow::Result<(String, Option<PostgresCluster>)> {
    if let Some(url) = variable(DATABASE_URL) {
        let reason = match timeout(LOGIN_TIMEOUT, may_create_databases(&url)).await {
            Ok(Ok(true)) => return Ok((url, None)),
            Ok(Ok(false)) => "the user may not create databases, which each test does".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {LOGIN_TIMEOUT:?}"),
        };
        bail!("cannot use Postgres at {DATABASE_URL}={}: {reason}", mask(&url));
    }
    say("starting a private Postgres");
    let cluster = PostgresCluster::start().await;
    Ok((cluster.url().to_owned(), Some(cluster)))
}

async fn may_create_databases(url: &str) -> Result<bool, sqlx::Error> {
    let mut connection = PgConnection::connect(url).await?;
    let rights = "SELECT rolsuper OR rolcreatedb FROM pg_roles WHERE rolname = current_user";
    sqlx::query_scalar(rights).fetch_one(&mut connection).await
}

/// Waits until the command has ended, and forwards signals to it.
async fn wait(mut child: Child, mut signals: mpsc::Receiver<Signal>) -> io::Result<ExitStatus> {
    let mut deadline = None;
    loop {
        tokio::select! {
            ended = child.wait() => return ended,
            Some(signal) = signals.recv() => {
                // A terminal sends SIGINT to the command as well, which may handle it and go on.
                if signal == Signal::INT && io::stdin().is_terminal() {
                    continue;
                }
                deadline.get_or_insert(Instant::now() + STOP_DEADLINE);
                let pid = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
                if let Some(Err(error)) = pid.map(|pid| kill_process(pid, signal)) {
                    say(&format!("cannot forward a signal to the command: {error}"));
                }
            }
            () = sleep_until(deadline.unwrap_or_else(Instant::now)), if deadline.is_some() => {
                child.kill().await?;
            }
        }
    }
}

/// The signals to stop that arrive from now on. A signal that is ignored, such as SIGHUP by
/// `nohup`, stays ignored, by the command as well.
fn stop_signals() -> io::Result<mpsc::Receiver<Signal>> {
    let (sender, receiver) = mpsc::channel(8);
    for stop in [Signal::HUP, Signal::INT, Signal::TERM] {
        if is_ignored(stop) {
            continue;
        }
        let (mut arrivals, sender) = (signal(SignalKind::from_raw(stop.as_raw()))?, sender.clone());
        tokio::spawn(async move {
            while arrivals.recv().await.is_some() && sender.send(stop).await.is_ok() {}
        });
    }
    Ok(receiver)
}

fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.unwrap_or(0) >> (signal.as_raw() - 1) & 1 == 1
}

/// Ends this process as the command has ended.
fn end_like(ended: ExitStatus) -> ExitCode {
    let signal = ended.signal().unwrap_or(0);
    if signal == Signal::INT.as_raw() {
        // A script that calls this program stops on ctrl-c only if SIGINT ends this program. The
        // handler of this process cannot be removed, but another program does not inherit it.
        let error = std::process::Command::new("sh").args(["-c", "kill -s INT $$"]).exec();
        say(&format!("cannot run sh: {error}"));
    }
    ExitCode::from(u8::try_from(ended.code().unwrap_or(128 + signal)).unwrap_or(u8::MAX))
}

/// A variable that is set and not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The URL without its password, which may also be in the query.
fn mask(url: &str) -> String {
    let Ok(mut url) = Url::parse(url) else { return "***".to_owned() };
    if url.password().is_some() && url.set_password(Some("***")).is_err() {
        return "***".to_owned();
    }
    if url.query().is_some() {
        url.set_query(Some("***"));
    }
    url.into()
}

fn say(message: &str) {
    eprintln!("with-servers: {message}");
}
