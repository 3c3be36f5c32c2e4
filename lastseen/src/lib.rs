//! `lastseen`: all roles in one process, by default with the queue and the table in files and with
//! the tester as partner and status API. This crate also contains the commands with which an
//! operator inspects and repairs the queue and the table.

mod banner;
mod config;
mod dead_letters;
mod groups;
mod history;
mod migrate;
mod objects;
mod roles;
mod status_line;

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Context as _;
use messaging::queue::OpenError;
use runtime::settings::Checked;
use runtime::{CancellationToken, Context, Description, Invocation, Reloadable, Unavailable};

pub use config::{Command, Config};

use roles::AllRoles;

/// The name of the process and the defaults of its common settings.
pub const DESCRIPTION: Description = Description {
    name: "lastseen",
    about: "Records which objects are online and when each was last seen: the whole pipeline in \
            one process. `lastseen producer` runs only that role, and so do consumer, routine, \
            viewer and tester; each has its own --help",
    admin_address: ":9091",
    drain_delay: "8s",
    reloadable: &[
        consumer::Lookups::RELOADABLE,
        routine::Cleanup::RELOADABLE,
        store::Retention::RELOADABLE,
    ],
};

/// The complete `main` of `lastseen` as a process.
#[must_use]
pub fn main() -> ExitCode {
    runtime::main_with_commands(DESCRIPTION, |config, context| plan(&config, context))
}

// Decision: docs/decisions/0065-when-does-lastseen-open-its-files.md
/// Plans what the settings select: the pipeline, or a command.
///
/// The pipeline's files are opened here, so that nothing starts if another process has them.
///
/// # Errors
/// [`Unavailable`] when another process has the files; or the reason why they cannot be opened.
pub fn plan(config: &Reloadable<Checked<Config>>, context: Context) -> anyhow::Result<Invocation> {
    let reloadable = config.map(Checked::into_inner);
    let mut config = reloadable.current();
    if let Some(command) = config.command.take() {
        return Ok(Invocation::command(run_command(command, config, context)));
    }
    let roles = AllRoles::open(config, &context.supervisor).map_err(unavailable_if_in_use)?;
    Ok(Invocation::service(roles.run(reloadable, context)))
}

async fn run_command(command: Command, config: Config, context: Context) -> anyhow::Result<()> {
    let shutdown = &context.shutdown;
    match command {
        Command::Objects(command) => {
            objects::list(&command, &config.store(), config.cleanup.object_ttl, shutdown).await
        }
        Command::History(command) => history::show(&command, &config.store(), shutdown).await,
        Command::Changes(command) => history::feed(&command, &config.store(), shutdown).await,
        Command::Groups(command) => {
            let ttl = config.cleanup.object_ttl;
            groups::show(&command, &config.groups, &config.store(), ttl, shutdown).await
        }
        Command::DeadLetters { command } => {
            dead_letters::run(command, &config.broker(), shutdown).await
        }
        Command::Migrate(command) => migrate::run(&command, &config.store(), &context).await,
    }
}

/// Runs `work`. When a signal arrives, cancels it and fails.
async fn unless_stopped<T, E: Into<anyhow::Error>>(
    shutdown: &CancellationToken,
    work: impl Future<Output = Result<T, E>>,
) -> anyhow::Result<T> {
    let result = shutdown.run_until_cancelled(work).await;
    result.context("stopped by a signal")?.map_err(Into::into)
}

/// Turns the error that another process uses a file into [`Unavailable`], which has its own exit
/// code.
fn unavailable_if_in_use(error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref() {
        Some(OpenError::InUse { .. }) => Unavailable(format!("{error:#}")).into(),
        _ => error,
    }
}

/// Prints a line. Returns `false` when the reader has closed the pipe, as `| head` does.
fn print_line(line: impl std::fmt::Display) -> anyhow::Result<bool> {
    match writeln!(io::stdout(), "{line}") {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to standard output"),
    }
}
