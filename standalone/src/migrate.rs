//! `lastseen migrate`: the table, for services whose roles may not make it.

use anyhow::Context as _;
use service::{CancellationToken, Misconfigured};
use store::Store;

use crate::print_line;

/// How long to see to it.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Migrate {
    /// Exit as soon as the table is as this version needs it
    #[arg(long)]
    once: bool,
}

/// Keeps the table as this version needs it, whatever becomes of the database, and says so whenever
/// it has come to be.
///
/// # Errors
/// When the database's file cannot be opened, standard output be written, or a signal ended `once`.
pub(crate) async fn run(
    command: &Migrate,
    config: &store::Config,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let store = Store::start(config, "migration", 1)?;
    let mut status = store.status();
    loop {
        let there = status.borrow_and_update().is_ok();
        if there && (!print_line("the table is there")? || command.once) {
            return Ok(());
        }
        tokio::select! {
            reason = store.rejected() => return Err(Misconfigured(reason).into()),
            changed = status.changed() => changed.context("the database is no longer watched")?,
            () = shutdown.cancelled() => {
                anyhow::ensure!(!command.once, "stopped by a signal");
                return Ok(());
            }
        }
    }
}
