//! The cleanup: an object that has not been seen for `OBJECT_TTL` is not online any more.

mod future_rows;
mod pauses;

use std::ops::RangeInclusive;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use events::{Emitter, Kind, Object};
use service::{CancellationToken, Description, Health, Misconfigured, Reloadable, settings};
use store::{Failure, Moment, Row, Store, StoreError, StoreStatus};
use tokio::sync::watch;
use tokio::time::{Interval, MissedTickBehavior};

use crate::future_rows::FutureRows;
use crate::pauses::Pauses;

/// What the process is called and where its admin address is.
pub const DESCRIPTION: Description = Description {
    name: "routine",
    about: "Deletes the objects that have not been seen for OBJECT_TTL",
    admin_address: ":9093",
    drain_delay: "0s",
    reloadable: &[Cleanup::RELOADABLE],
};

/// When the last cleanup succeeded.
const LAST_SUCCESS: &str = "lastseen_cleanup_last_success_timestamp_seconds";
/// How many stale rows the last cleanup could not delete.
const NOT_DELETED: &str = "lastseen_stale_rows_not_deleted";
/// How long `--once` waits for the database before it fails; cron will try again.
const ONCE_PATIENCE: Duration = Duration::from_secs(30);
/// How soon a failed cleanup is tried again if `ROUTINE_INTERVAL` is longer.
const RETRY_INTERVAL: Duration = Duration::from_secs(3);
/// Stale rows that one cleanup leaves because each of them cannot be deleted; beyond these it fails.
const NOT_DELETED_MAX: usize = 1_000;
/// How long `--once` waits for the events' connection; it does without.
const EVENTS_PATIENCE: Duration = Duration::from_secs(2);

const ROUTINE_INTERVAL: RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_hours(24);
const OBJECT_TTL: RangeInclusive<Duration> =
    Duration::from_secs(1)..=Duration::from_hours(365 * 24);

/// The routine's settings.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Config {
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub cleanup: Cleanup,
    /// Clean up once and exit, for a cron job
    #[arg(long, help_heading = "Cleanup")]
    pub once: bool,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub store: store::Config,
    #[command(flatten)]
    #[expect(missing_docs, reason = "documented at its type; text here would replace the help's")]
    pub events: events::Config,
}

/// What is deleted, and how often.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Cleanup")]
#[group(skip)]
pub struct Cleanup {
    /// How often stale objects are deleted
    #[arg(long, value_parser = settings::duration(ROUTINE_INTERVAL), default_value = "3s")]
    pub routine_interval: Duration,
    /// How long after it was last seen an object becomes stale
    #[arg(long, value_parser = settings::duration(OBJECT_TTL), default_value = "30s")]
    pub object_ttl: Duration,
    /// The most rows deleted by one statement; an upsert waits at most for one of these
    #[arg(long, value_parser = settings::number(1..=100_000_u32), default_value = "10000")]
    pub delete_batch_max: u32,
}

impl Cleanup {
    /// The variables that are heeded while the routine runs.
    pub const RELOADABLE: &[&str] = &["ROUTINE_INTERVAL", "OBJECT_TTL", "DELETE_BATCH_MAX"];
}

/// Deletes what is stale every `ROUTINE_INTERVAL` until `shutdown`, or once with `--once`. While it runs, it
/// heeds changes of [`Cleanup::RELOADABLE`].
///
/// # Errors
/// When a file cannot be opened, or what writes it has died. With `--once`, also when the database
/// does not do its part; otherwise that is logged and tried again with the next interval.
pub async fn run(
    config: Reloadable<Config>,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    describe_metrics();
    let live = config.map(|config| config.cleanup);
    let Config { cleanup, once, store, events } = config.current();
    let events = Emitter::start(&events.exchange(), "routine: events");
    let store = Store::start(&store, "routine", 1)?;
    let (writes, write_status) = watch::channel(Ok(()));
    health.add_required("database", store.status());
    health.add_required("database writes", write_status);
    if let Some(status) = events.status() {
        health.add_optional("events", status);
    }
    health.finish_registration();
    let table = Table { store, events, writes };
    let ended = if once {
        clean_up_once(&table, &cleanup, &shutdown).await
    } else {
        clean_up_until(&table, cleanup, live, shutdown).await
    };
    table.events.close().await;
    ended
}

/// The table, and where deletions are announced.
struct Table {
    store: Store,
    events: Emitter,
    /// Whether the last cleanup could be done, or why not.
    writes: watch::Sender<StoreStatus>,
}

async fn clean_up_until(
    table: &Table,
    mut cleanup: Cleanup,
    mut live: Reloadable<Cleanup>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let store = &table.store;
    let mut interval = every(cleanup.routine_interval);
    let mut pauses = Pauses::default();
    let mut future_rows = FutureRows::default();
    let mut failing = false;
    loop {
        tokio::select! {
            _ = interval.tick() => {}
            () = tokio::time::sleep(RETRY_INTERVAL), if failing => {}
            changed = live.changed() => {
                let before = std::mem::replace(&mut cleanup, changed).routine_interval;
                if cleanup.routine_interval != before {
                    interval = every(cleanup.routine_interval);
                }
                continue;
            }
            () = shutdown.cancelled() => return Ok(()),
            () = store.died() => anyhow::bail!("the store has died"),
            reason = store.rejected() => return Err(Misconfigured(reason).into()),
            () = table.events.died() => anyhow::bail!("what tells events has died"),
        }
        // The store logs and reports by itself when the database is away.
        if store.status().borrow().is_err() {
            pauses.outage();
            table.report_writes(Ok(()));
            continue;
        }
        let cleaned = clean_up(table, &cleanup, &mut pauses, &mut future_rows, &shutdown).await;
        let status = cleaned.as_ref().map(drop).map_err(|error| format!("cleanup failed: {error}"));
        table.report_writes(status);
        match cleaned {
            Ok(_) => failing = false,
            Err(error) => {
                pauses.outage();
                if failing {
                    tracing::debug!(%error, "cleanup failed again");
                } else {
                    tracing::warn!(%error, "cleanup failed; trying again until it succeeds");
                }
                failing = true;
            }
        }
    }
}

/// The ticks of the cleanups, the first at once.
fn every(interval: Duration) -> Interval {
    let mut ticks = tokio::time::interval(interval);
    // After an outage one cleanup is enough; those that were missed have nothing left to delete.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

async fn clean_up_once(
    table: &Table,
    config: &Cleanup,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let store = &table.store;
    let mut status = store.status();
    let ready = async {
        let ready = tokio::time::timeout(ONCE_PATIENCE, status.wait_for(Result::is_ok)).await;
        ready.map(|ready| ready.map(drop))
    };
    let ready = tokio::select! {
        ready = ready => ready,
        reason = store.rejected() => return Err(Misconfigured(reason).into()),
    };
    let Ok(ready) = ready else {
        let reason = store.status().borrow().clone().err().unwrap_or_default();
        anyhow::bail!("no database within {ONCE_PATIENCE:?}: {reason}");
    };
    ready.context("the database is no longer watched")?;
    if let Some(mut status) = table.events.status() {
        let connected = tokio::time::timeout(EVENTS_PATIENCE, status.wait_for(Result::is_ok));
        if connected.await.is_err() {
            tracing::debug!("no connection for events: deletions are not announced");
        }
    }
    let (mut pauses, mut future_rows) = (Pauses::default(), FutureRows::default());
    // A pause is waited for here: otherwise a table that is stale would never be cleaned by cron.
    while let Done::Paused(rest) =
        clean_up(table, config, &mut pauses, &mut future_rows, shutdown).await?
    {
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            () = shutdown.cancelled() => break,
        }
    }
    Ok(())
}

/// What a cleanup that did not fail came to.
enum Done {
    Cleaned,
    /// Nothing may be deleted for this time.
    Paused(Duration),
}

/// Deletes what is stale, unless the rows may only look stale: see [`Pauses`].
///
/// The clock is read once for all batches, and no statement looks at it again: a step in between
/// deletes nothing.
async fn clean_up(
    table: &Table,
    config: &Cleanup,
    pauses: &mut Pauses,
    future_rows: &mut FutureRows,
    shutdown: &CancellationToken,
) -> Result<Done, StoreError> {
    let outcome = clean_up_unless_paused(table, config, pauses, future_rows, shutdown).await;
    count(match &outcome {
        Ok(Done::Cleaned) => "ok",
        Ok(Done::Paused(_)) => "skipped",
        Err(_) => "failed",
    });
    outcome
}

async fn clean_up_unless_paused(
    table: &Table,
    config: &Cleanup,
    pauses: &mut Pauses,
    future_rows: &mut FutureRows,
    shutdown: &CancellationToken,
) -> Result<Done, StoreError> {
    let ttl = config.object_ttl;
    // Before the clock is read: a row that is dated by a clock which has just been set back would look stale by the earlier reading.
    future_rows.correct(&table.store, config.delete_batch_max).await;
    let asked_at = Instant::now();
    let now = table.store.now().await?;
    let oldest = now.before(ttl);
    if let Some(step) = pauses.compare(now, asked_at, Instant::now()) {
        tracing::warn!(?step, pause = ?ttl, "the database's clock has stepped ahead; pausing deletions");
    }
    if pauses.is_unjudged() {
        let (stale, all) = table.store.count_stale(oldest).await?;
        if pauses.judge(stale, all) {
            tracing::warn!(
                stale, all, pause = ?ttl,
                "most rows look stale after a start or an outage; pausing deletions so that objects which are still online can be seen again"
            );
        }
    }
    if let Some(rest) = pauses.rest(ttl) {
        return Ok(Done::Paused(rest));
    }
    delete(table, oldest, config.delete_batch_max, shutdown).await?;
    pauses.cleaned();
    Ok(Done::Cleaned)
}

/// Deletes batch after batch until one is short.
///
/// Replicas do not collide: each skips the rows that another is deleting.
async fn delete(
    table: &Table,
    oldest: Moment,
    batch_max: u32,
    shutdown: &CancellationToken,
) -> Result<(), StoreError> {
    let started = Instant::now();
    let mut deleted = 0;
    let outcome = loop {
        match table.store.delete_stale(oldest, batch_max).await {
            Ok(rows) => {
                deleted += table.announce(&rows);
                if rows.len() < batch_max as usize || shutdown.is_cancelled() {
                    set_not_deleted(0);
                    break Ok(());
                }
            }
            Err(error) => {
                table.leave_gap_after(&error);
                match error.failure() {
                    // One row is enough to fail a batch, as by a foreign key that refers to it.
                    Failure::RefusedRow | Failure::BusyRow => {
                        break delete_by_parts(table, oldest, batch_max, shutdown, &mut deleted)
                            .await;
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

/// Deletes all stale rows but those that cannot be deleted, which it finds by halving.
async fn delete_by_parts(
    table: &Table,
    oldest: Moment,
    batch_max: u32,
    shutdown: &CancellationToken,
    deleted: &mut u64,
) -> Result<(), StoreError> {
    let mut not_deleted = Vec::new();
    loop {
        let ids = table.store.stale(oldest, batch_max, &not_deleted).await?;
        let is_last = ids.len() < batch_max as usize;
        let mut parts = vec![ids];
        while let Some(ids) = parts.pop().filter(|ids| !ids.is_empty()) {
            match table.store.delete_these(oldest, &ids).await {
                Ok(rows) => *deleted += table.announce(&rows),
                Err(error) => {
                    table.leave_gap_after(&error);
                    let is_connection = error.failure() == Failure::Connection;
                    if is_connection || not_deleted.len() >= NOT_DELETED_MAX {
                        return Err(error);
                    }
                    if let &[id] = ids.as_slice() {
                        tracing::debug!(id, %error, "a stale row cannot be deleted");
                        not_deleted.push(id);
                    } else {
                        let (first, second) = ids.split_at(ids.len() / 2);
                        parts.extend([second.to_vec(), first.to_vec()]);
                    }
                }
            }
        }
        if is_last || shutdown.is_cancelled() {
            set_not_deleted(not_deleted.len());
            return Ok(());
        }
    }
}

impl Table {
    /// Announces deleted rows, and says how many there are.
    fn announce(&self, rows: &[Row]) -> u64 {
        let gone = |row: &Row| Object { id: row.id, last_seen: row.last_seen.time() };
        self.events.publish(Kind::Gone, rows.iter().map(gone));
        rows.len() as u64
    }

    fn report_writes(&self, status: StoreStatus) {
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

#[expect(clippy::cast_precision_loss, reason = "their number is bounded")]
fn set_not_deleted(rows: usize) {
    if rows > 0 {
        tracing::warn!(
            rows,
            "stale rows cannot be deleted, as because of a foreign key or a trigger; others are"
        );
    }
    metrics::gauge!(NOT_DELETED).set(rows as f64);
}

fn count(outcome: &'static str) {
    metrics::counter!("lastseen_cleanups_total", "outcome" => outcome).increment(1);
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
        "When the last cleanup that did not fail ended, since 1970; 0 before the first."
    );
    metrics::gauge!(LAST_SUCCESS).set(0.0);
    metrics::describe_gauge!(NOT_DELETED, "Stale rows that the last cleanup could not delete.");
    metrics::gauge!(NOT_DELETED).set(0.0);
    metrics::describe_histogram!(
        "lastseen_cleanup_seconds",
        metrics::Unit::Seconds,
        "Time that one cleanup took, all of its batches together."
    );
}
