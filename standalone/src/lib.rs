//! `lastseen`: all roles in one process, by default with the queue and the table in files and with
//! the tester as partner and status API. It also contains the commands with which an operator
//! inspects and repairs the queue and the table.

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

use roles::AllRoles;

/// The name of the process and the defaults of its common settings.
pub const DESCRIPTION: Description = Description {
    name: "lastseen",
    about: "Records which objects are online and when each was last seen: the whole pipeline in \
            one process",
    admin_address: ":9091",
    drain_delay: "8s",
    reloadable: &[consumer::Lookups::RELOADABLE, routine::Cleanup::RELOADABLE],
};

// Decision: docs/decisions/0065-when-does-lastseen-open-its-files.md
/// Plans what the settings select: the pipeline, or a command.
///
/// The pipeline's files are opened here, so that nothing starts if another process has them.
///
/// # Errors
/// [`Unavailable`] when another process has the files; or the reason why they cannot be opened.
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
    let reloadable = config.map(Checked::into_inner);
    let mut config = reloadable.current();
    if let Some(command) = config.command.take() {
        return Ok(Invocation::Command(run_command(command, config, shutdown)));
    }
    let roles = AllRoles::open(config).map_err(unavailable_if_in_use)?;
    Ok(Invocation::Service(roles.run(reloadable, health, shutdown)))
}

async fn run_command(
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

/// Runs `work`, or cancels it and fails when a signal arrives.
async fn unless_stopped<T, E: Into<anyhow::Error>>(
    shutdown: &CancellationToken,
    work: impl Future<Output = Result<T, E>>,
) -> anyhow::Result<T> {
    let result = shutdown.run_until_cancelled(work).await;
    result.context("stopped by a signal")?.map_err(Into::into)
}

/// Turns the error that another process has a file into [`Unavailable`], which has an exit code of
/// its own.
fn unavailable_if_in_use(error: anyhow::Error) -> anyhow::Error {
    let by_broker = matches!(error.downcast_ref(), Some(OpenError::InUse { .. }));
    let by_store = matches!(error.downcast_ref(), Some(StoreError::Open(OpenError::InUse { .. })));
    if by_broker || by_store { Unavailable(format!("{error:#}")).into() } else { error }
}

/// Prints a line. Returns `false` when the reader has closed the pipe, as `| head` does.
fn print_line(line: impl std::fmt::Display) -> anyhow::Result<bool> {
    match writeln!(io::stdout(), "{line}") {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}
