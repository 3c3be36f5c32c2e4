//! `lastseen migrate`: creates the table for services whose database roles may not create it.

use anyhow::Context as _;
use runtime::{Context, Misconfigured};
use store::Store;

use crate::print_line;

/// How long to run.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Migrate {
    /// Exit as soon as the table matches this version
    #[arg(long)]
    once: bool,
}

/// Creates or upgrades the table now and after each outage of the database, and prints a line each
/// time the table matches this version.
///
/// # Errors
/// When the database's file cannot be opened, the table is unusable, standard output cannot be
/// written, or a signal stops a run with `once`.
pub(crate) async fn run(
    command: &Migrate,
    config: &store::Config,
    Context { shutdown, supervisor, .. }: &Context,
) -> anyhow::Result<()> {
    let store = Store::start(config.open(supervisor)?, "migration", 1);
    let mut status = store.status();
    loop {
        let is_ready = status.borrow_and_update().is_ok();
        if is_ready && (!print_line("the table is ready")? || command.once) {
            return Ok(());
        }
        tokio::select! {
            reason = store.rejected() => return Err(Misconfigured(reason).into()),
            changed = status.changed() => changed.context("the database monitor stopped")?,
            () = shutdown.cancelled() => {
                anyhow::ensure!(!command.once, "stopped by a signal");
                return Ok(());
            }
        }
    }
}
