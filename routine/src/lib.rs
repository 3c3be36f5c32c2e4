//! The cleanup: deletes objects that have not been seen for `OBJECT_TTL` and so count as offline.

mod future_rows;
mod history;
mod pauses;

use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use messaging::events::{Emitter, Exchange, Kind, Object};
use runtime::{
    CancellationToken, Context, Description, Misconfigured, Reloadable, Status, settings,
};
use store::{Cutoff, Database, Failure, Retention, Row, Store, StoreError};
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior};

use crate::future_rows::FutureRows;
use crate::pauses::Pauses;

/// The name of the process and the defaults of its common settings.
pub const DESCRIPTION: Description = Description {
    name: "routine",
    about: "Deletes the objects that have not been seen for OBJECT_TTL",
    admin_address: ":9093",
    drain_delay: "0s",
    reloadable: &[Cleanup::RELOADABLE, Retention::RELOADABLE],
};

/// The complete `main` of the routine as a process.
#[must_use]
pub fn main() -> ExitCode {
    runtime::main(DESCRIPTION, run)
}

const LAST_SUCCESS: &str = "lastseen_cleanup_last_success_timestamp_seconds";
const NOT_DELETED: &str = "lastseen_stale_rows_not_deleted";
/// How long `--once` waits for the database before it fails. The next run of the cron job tries
/// again.
const ONCE_DATABASE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long `--once` waits for the broker before it cleans up without announcing deletions.
const ONCE_EVENTS_TIMEOUT: Duration = Duration::from_secs(2);
/// A failed cleanup is retried after this time, or after `ROUTINE_INTERVAL` if that is shorter.
const RETRY_INTERVAL: Duration = Duration::from_secs(3);
/// One connection for the cleanup, and one for the maintenance of the history.
const DATABASE_CONNECTIONS: u32 = 2;
/// How many undeletable rows one cleanup skips before it fails.
const NOT_DELETED_MAX: usize = 1_000;

const ROUTINE_INTERVAL: RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_hours(24);
const OBJECT_TTL: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_hours(365 * 24);

/// The routine's settings.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
#[expect(missing_docs, reason = "documented at their types; text here would replace the help's")]
pub struct Config {
    #[command(flatten)]
    pub cleanup: Cleanup,
    /// Clean up once and exit, for a cron job
    #[arg(long, help_heading = "Cleanup")]
    pub once: bool,
    #[command(flatten)]
    pub store: store::Config,
    #[command(flatten)]
    pub events: messaging::events::Config,
}

/// Which rows to delete, and how often.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Cleanup")]
#[group(skip)]
pub struct Cleanup {
    /// How often to delete stale objects
    #[arg(long, value_parser = settings::duration(ROUTINE_INTERVAL), default_value = "3s")]
    pub routine_interval: Duration,
    /// How long an object stays in the table after it was last seen
    #[arg(long, value_parser = settings::duration(OBJECT_TTL), default_value = "30s")]
    pub object_ttl: Duration,
    /// Maximum number of rows that one statement deletes; an upsert waits for at most one such
    /// statement
    #[arg(long, value_parser = settings::number(1..=100_000_u32), default_value = "10000")]
    pub delete_batch_max: u32,
}

impl Cleanup {
    /// The variables of the reloadable settings.
    pub const RELOADABLE: &[&str] = &["ROUTINE_INTERVAL", "OBJECT_TTL", "DELETE_BATCH_MAX"];
}

/// The open resources of the routine.
pub struct Resources {
    /// The database whose stale rows the routine deletes.
    pub database: Database,
    /// The exchange on which the routine announces deletions.
    pub exchange: Exchange,
}

/// Opens the resources that the settings name. Cleans up until the shutdown, or once with `--once`.
///
/// # Errors
/// When a file cannot be opened, and in the same cases as [`run_with`]. With `--once`, also when
/// the cleanup fails.
pub async fn run(config: Reloadable<Config>, context: Context) -> anyhow::Result<()> {
    let Config { cleanup, once, store, events } = config.current();
    let retention = config.map(|config| config.store.history);
    let database = store.open(&context.supervisor)?.with_retention(retention);
    let resources = Resources { database, exchange: events.exchange() };
    if !once {
        return run_with(config.map(|config| config.cleanup), resources, context).await;
    }
    let table = Table::start(resources, &context);
    let result = clean_up_once(&table, &cleanup).await;
    if result.is_ok()
        && let Err(error) = history::maintain(&table.store).await
    {
        tracing::warn!(%error, "cannot maintain the history");
    }
    table.events.close().await;
    result
}

/// Deletes stale rows every `ROUTINE_INTERVAL` until the shutdown. Applies changes of
/// [`Cleanup::RELOADABLE`] while it runs. A cleanup that fails is retried.
///
/// # Errors
/// When the table is unusable.
pub async fn run_with(
    cleanup: Reloadable<Cleanup>,
    resources: Resources,
    context: Context,
) -> anyhow::Result<()> {
    let table = Table::start(resources, &context);
    let maintenance = history::maintain_forever(Arc::clone(&table.store));
    let _maintenance = context
        .supervisor
        .spawn_critical("maintenance of the history", async move { match maintenance.await {} });
    let result = clean_up_until_shutdown(&table, cleanup).await;
    table.events.close().await;
    result
}

/// The table, with the emitter that announces deletions and the status that health checks report.
struct Table {
    store: Arc<Store>,
    events: Emitter,
    /// `Ok` if the last cleanup succeeded; otherwise the reason.
    writes: watch::Sender<Status>,
    shutdown: CancellationToken,
}

/// The state that one cleanup passes on to the next.
#[derive(Default)]
struct CleanupState {
    pauses: Pauses,
    future_rows: FutureRows,
}

async fn clean_up_until_shutdown(
    table: &Table,
    mut reloadable: Reloadable<Cleanup>,
) -> anyhow::Result<()> {
    let mut cleanup = reloadable.current();
    let store = &table.store;
    let mut interval = cleanup_interval(cleanup.routine_interval);
    let mut state = CleanupState::default();
    let mut is_failing = false;
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = tokio::time::sleep(RETRY_INTERVAL), if is_failing => {}
            changed = reloadable.changed() => {
                let before = std::mem::replace(&mut cleanup, changed).routine_interval;
                if cleanup.routine_interval != before {
                    interval = cleanup_interval(cleanup.routine_interval);
                }
                continue;
            }
            () = table.shutdown.cancelled() => return Ok(()),
            reason = store.rejected() => return Err(Misconfigured(reason).into()),
        }
        // The store itself logs and reports that the database is away.
        if store.status().borrow().is_err() {
            state.pauses.record_outage();
            table.report_writes(Ok(()));
            continue;
        }
        let result = clean_up(table, &cleanup, &mut state).await;
        let status = result.as_ref().map(drop).map_err(|error| format!("cleanup failed: {error}"));
        table.report_writes(status);
        match result {
            Ok(_) => is_failing = false,
            Err(error) => {
                state.pauses.record_outage();
                if is_failing {
                    tracing::debug!(%error, "cleanup failed again");
                } else {
                    tracing::warn!(%error, "cleanup failed; trying again until it succeeds");
                }
                is_failing = true;
            }
        }
    }
}

/// The ticks that start cleanups; the first comes immediately.
fn cleanup_interval(interval: Duration) -> Interval {
    let mut ticks = tokio::time::interval(interval);
    // A late cleanup also does the work of the missed ones, so the routine does not catch up.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn clean_up_once(table: &Table, config: &Cleanup) -> anyhow::Result<()> {
    let store = &table.store;
    let mut status = store.status();
    let available = async {
        let wait = tokio::time::timeout(ONCE_DATABASE_TIMEOUT, status.wait_for(Result::is_ok));
        wait.await.map(|available| available.map(drop))
    };
    let available = tokio::select! {
        available = available => available,
        reason = store.rejected() => return Err(Misconfigured(reason).into()),
    };
    let Ok(available) = available else {
        let reason = store.status().borrow().clone().err().unwrap_or_default();
        anyhow::bail!("no database within {ONCE_DATABASE_TIMEOUT:?}: {reason}");
    };
    available.context("the database monitor stopped")?;
    if let Some(mut status) = table.events.status() {
        let connected = tokio::time::timeout(ONCE_EVENTS_TIMEOUT, status.wait_for(Result::is_ok));
        if connected.await.is_err() {
            tracing::debug!("no connection for events; deletions are not announced");
        }
    }
    let mut state = CleanupState::default();
    // Waits for the end of a pause. Otherwise each run of a cron job would begin a new pause, and a
    // mostly stale table would never be cleaned.
    while let Outcome::Paused(remaining) = clean_up(table, config, &mut state).await? {
        tokio::select! {
            () = tokio::time::sleep(remaining) => {}
            () = table.shutdown.cancelled() => break,
        }
    }
    Ok(())
}

/// The outcome of a cleanup that did not fail.
enum Outcome {
    Cleaned,
    /// Deletions are paused for this time.
    Paused(Duration),
}

/// Deletes stale rows, unless they may only look stale: see [`Pauses`].
///
/// The database's clock is read once for all batches, so that a step of the clock during a cleanup
/// makes no row look stale, see [`Cutoff`].
async fn clean_up(
    table: &Table,
    config: &Cleanup,
    state: &mut CleanupState,
) -> Result<Outcome, StoreError> {
    let outcome = clean_up_unless_paused(table, config, state).await;
    let label = match &outcome {
        Ok(Outcome::Cleaned) => "ok",
        Ok(Outcome::Paused(_)) => "skipped",
        Err(_) => "failed",
    };
    metrics::counter!("lastseen_cleanups_total", "outcome" => label).increment(1);
    outcome
}

async fn clean_up_unless_paused(
    table: &Table,
    config: &Cleanup,
    CleanupState { pauses, future_rows }: &mut CleanupState,
) -> Result<Outcome, StoreError> {
    let ttl = config.object_ttl;
    // Rows are corrected before the clock is read. In the other order, a row that is corrected
    // after the clock was set back would look stale compared with the earlier reading.
    future_rows.correct(&table.store, config.delete_batch_max).await;
    let requested_at = Instant::now();
    let now = table.store.now().await?;
    let cutoff = now.before(ttl);
    if let Some(step) = pauses.compare(now, requested_at, Instant::now()) {
        tracing::warn!(
            ?step, pause = ?ttl,
            "the database's clock has stepped ahead; pausing deletions so that no object is \
            deleted too early"
        );
    }
    if pauses.is_check_due() {
        let (stale, all) = table.store.count_stale(cutoff).await?;
        if pauses.check_table(stale, all) {
            tracing::warn!(
                stale, all, pause = ?ttl,
                "most rows look stale after a start or an outage; pausing deletions so that \
                objects that are still online can be seen again"
            );
        }
    }
    if let Some(remaining) = pauses.remaining(ttl) {
        return Ok(Outcome::Paused(remaining));
    }
    delete(table, cutoff, config.delete_batch_max).await?;
    pauses.record_cleanup();
    Ok(Outcome::Cleaned)
}

/// Deletes batch after batch until one is not full.
///
/// Several routines may run at the same time: each skips the rows that another is deleting.
async fn delete(table: &Table, cutoff: Cutoff, batch_max: u32) -> Result<(), StoreError> {
    let started = Instant::now();
    let mut deleted = 0;
    let outcome = loop {
        match table.store.delete_stale(cutoff, batch_max).await {
            Ok(rows) => {
                deleted += table.announce(&rows);
                if rows.len() < batch_max as usize || table.shutdown.is_cancelled() {
                    set_not_deleted(0);
                    break Ok(());
                }
            }
            Err(error) => {
                table.leave_gap_after(&error);
                match error.failure() {
                    // A single row fails its batch, for example if a foreign key refers to it.
                    Failure::RefusedRow | Failure::BusyRow => {
                        break delete_by_halving(table, cutoff, batch_max, &mut deleted).await;
                    }
                    Failure::Connection | Failure::Database => break Err(error),
                }
            }
        }
    };
    if outcome.is_ok() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        metrics::gauge!(LAST_SUCCESS).set(now.as_secs_f64());
    }
    metrics::counter!("lastseen_deleted_rows_total").increment(deleted);
    metrics::histogram!("lastseen_cleanup_seconds").record(started.elapsed());
    if deleted > 0 {
        tracing::info!(deleted, took = ?started.elapsed(), "deleted stale objects");
    }
    outcome
}

/// Deletes all stale rows that can be deleted. Halves each batch that fails until only rows that
/// cannot be deleted are left.
async fn delete_by_halving(
    table: &Table,
    cutoff: Cutoff,
    batch_max: u32,
    deleted: &mut u64,
) -> Result<(), StoreError> {
    let mut not_deleted = Vec::new();
    loop {
        let ids = table.store.list_stale(cutoff, batch_max, &not_deleted).await?;
        let is_last = ids.len() < batch_max as usize;
        let mut batches = vec![ids];
        while let Some(ids) = batches.pop().filter(|ids| !ids.is_empty()) {
            match table.store.delete_stale_among(cutoff, &ids).await {
                Ok(rows) => *deleted += table.announce(&rows),
                Err(error) => {
                    table.leave_gap_after(&error);
                    let is_connection = error.failure() == Failure::Connection;
                    if is_connection || not_deleted.len() >= NOT_DELETED_MAX {
                        return Err(error);
                    }
                    if let &[id] = ids.as_slice() {
                        tracing::debug!(id, %error, "cannot delete a stale row");
                        not_deleted.push(id);
                    } else {
                        let (first, second) = ids.split_at(ids.len() / 2);
                        batches.extend([second.to_vec(), first.to_vec()]);
                    }
                }
            }
        }
        if is_last || table.shutdown.is_cancelled() {
            set_not_deleted(not_deleted.len());
            return Ok(());
        }
    }
}

impl Table {
    fn start(resources: Resources, context: &Context) -> Self {
        describe_metrics();
        let Resources { database, exchange } = resources;
        let Context { health, supervisor, shutdown } = context;
        let events = Emitter::start(&exchange, "routine: events", supervisor);
        let store = Arc::new(Store::start(database, "routine", DATABASE_CONNECTIONS));
        let (writes, write_status) = watch::channel(Ok(()));
        health.add_required("database", store.status());
        health.add_required("database writes", write_status);
        if let Some(status) = store.history_status() {
            health.add_optional("history", status);
        }
        if let Some(status) = events.status() {
            health.add_optional("events", status);
        }
        health.finish_registration();
        Self { store, events, writes, shutdown: shutdown.clone() }
    }

    /// Announces deleted rows, and returns their number.
    fn announce(&self, rows: &[Row]) -> u64 {
        let gone = |row: &Row| Object { id: row.id, last_seen: row.last_seen.time() };
        self.events.publish(Kind::Gone, rows.iter().map(gone));
        rows.len() as u64
    }

    fn report_writes(&self, status: Status) {
        self.writes.send_if_modified(|before| {
            let is_new = *before != status;
            *before = status;
            is_new
        });
    }

    fn leave_gap_after(&self, error: &StoreError) {
        if error.may_be_committed() {
            self.events
                .leave_gap("a deletion may have been committed although its outcome was lost");
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "at most NOT_DELETED_MAX")]
fn set_not_deleted(rows: usize) {
    if rows > 0 {
        tracing::warn!(
            rows,
            "cannot delete some stale rows, for example because of a foreign key or a trigger; \
            all others were deleted"
        );
    }
    metrics::gauge!(NOT_DELETED).set(rows as f64);
}

fn describe_metrics() {
    metrics::describe_counter!("lastseen_deleted_rows_total", "Stale rows deleted.");
    metrics::counter!("lastseen_deleted_rows_total").increment(0);
    metrics::describe_counter!("lastseen_cleanups_total", "Cleanups by outcome.");
    for outcome in ["ok", "failed", "skipped"] {
        metrics::counter!("lastseen_cleanups_total", "outcome" => outcome).increment(0);
    }
    metrics::describe_gauge!(
        LAST_SUCCESS,
        metrics::Unit::Seconds,
        "Time of the last successful cleanup, since 1970; 0 before the first."
    );
    metrics::gauge!(LAST_SUCCESS).set(0.0);
    metrics::describe_gauge!(NOT_DELETED, "Stale rows that the last cleanup could not delete.");
    metrics::gauge!(NOT_DELETED).set(0.0);
    metrics::describe_histogram!(
        "lastseen_cleanup_seconds",
        metrics::Unit::Seconds,
        "Duration of a cleanup with all of its batches."
    );
}
