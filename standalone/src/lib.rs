//! All of Lastseen in one process: the very roles that run as services elsewhere, by default on a
//! queue and a table in files, with the tester as partner and status API. And the commands by which
//! a person looks at what is there.

mod banner;
mod config;
mod dead_letters;
mod migrate;
mod objects;
mod roles;
mod status_line;

use std::io::{self, Write as _};

use anyhow::Context as _;
use broker::OpenError;
use service::{CancellationToken, Description, Health, Invocation, Reloadable, Unavailable};
use store::StoreError;
use tester::config::Checked;

pub use config::{Command, Config};

use roles::Stage;

/// What the process is called and where its admin address is.
pub const DESCRIPTION: Description = Description {
    name: "lastseen",
    about: "Keeps who is online now, and when each was last seen: the whole pipeline in one process",
    admin_address: ":9091",
    drain_delay: "8s",
    reloadable: &[consumer::Lookups::RELOADABLE, routine::Cleanup::RELOADABLE],
};

// Decision: docs/decisions/0065-when-does-lastseen-open-its-files.md
/// What the settings ask for: the pipeline, or what their subcommand does.
///
/// The files are opened here, first of all: if another process has them, nothing is begun.
///
/// # Errors
/// [`Unavailable`] when another process has the files; or why they cannot be opened.
pub fn plan(
    config: &Reloadable<Checked<Config>>,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<
    Invocation<
        impl Future<Output = anyhow::Result<()>> + Send + use<>,
        impl Future<Output = anyhow::Result<()>> + Send + use<>,
    >,
> {
    let live = config.map(Checked::into_inner);
    let mut config = live.current();
    if let Some(command) = config.command.take() {
        return Ok(Invocation::Command(carry_out(command, config, shutdown)));
    }
    let stage = Stage::set(config).map_err(in_use)?;
    Ok(Invocation::Service(stage.play(live, health, shutdown)))
}

async fn carry_out(
    command: Command,
    config: Config,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    match command {
        Command::Objects(command) => {
            objects::list(&command, &config.store(), config.cleanup.object_ttl, &shutdown).await
        }
        Command::DeadLetters { command } => {
            dead_letters::run(command, &config.broker(), &shutdown).await
        }
        Command::Migrate(command) => migrate::run(&command, &config.store(), &shutdown).await,
    }
}

/// What `work` comes to. It is dropped midway, and that is an error, when a signal asks for the end.
async fn unless_stopped<T, E: Into<anyhow::Error>>(
    shutdown: &CancellationToken,
    work: impl Future<Output = Result<T, E>>,
) -> anyhow::Result<T> {
    let ended = shutdown.run_until_cancelled(work).await;
    ended.context("stopped by a signal")?.map_err(Into::into)
}

/// Tells that another process has a file by an exit code of its own.
fn in_use(error: anyhow::Error) -> anyhow::Error {
    let by_broker = matches!(error.downcast_ref(), Some(OpenError::InUse { .. }));
    let by_store = matches!(error.downcast_ref(), Some(StoreError::Open(OpenError::InUse { .. })));
    if by_broker || by_store { Unavailable(format!("{error:#}")).into() } else { error }
}

/// Prints a line; `false` when nobody reads any more, as behind `| head`.
fn print_line(line: impl std::fmt::Display) -> anyhow::Result<bool> {
    match writeln!(io::stdout(), "{line}") {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}
