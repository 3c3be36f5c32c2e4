//! The cleanup: whoever has not been seen for `OBJECT_TTL` is not online any more.

mod future_rows;
mod steps;

use std::ops::RangeInclusive;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use events::{Emitter, Kind, Object};
use service::{CancellationToken, Description, Health, Live, Misconfigured, settings};
use store::{Moment, Row, Store, StoreError};
use tokio::time::{Interval, MissedTickBehavior};

use crate::future_rows::FutureRows;
use crate::steps::Steps;

/// What the process is called and where its admin address is.
pub const DESCRIPTION: Description = Description {
    name: "routine",
    about: "Deletes the objects that have not been seen for OBJECT_TTL",
    admin_address: ":9093",
    drain_delay: "0s",
    live: &[Cleanup::LIVE],
};

/// When the last cleanup succeeded.
const LAST_SUCCESS: &str = "lastseen_cleanup_last_success_timestamp_seconds";
/// How long `--once` waits for the database before it fails; cron will try again.
const ONCE_PATIENCE: Duration = Duration::from_secs(30);
/// How long `--once` waits for whoever is told; it does without.
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
    pub const LIVE: &[&str] = &["ROUTINE_INTERVAL", "OBJECT_TTL", "DELETE_BATCH_MAX"];
}

/// Deletes what is stale every `ROUTINE_INTERVAL` until `shutdown`, or once with `--once`. While it runs, it
/// heeds changes of [`Cleanup::LIVE`].
///
/// # Errors
/// When a file cannot be opened, or what writes it has died. With `--once`, also when the database
/// does not do its part; otherwise that is logged and tried again with the next interval.
pub async fn run(
    config: Live<Config>,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    describe_metrics();
    let live = config.part(|config| config.cleanup);
    let Config { cleanup, once, store, events } = config.now();
    let events = Emitter::start(&events.exchange(), "routine: events");
    let store = Store::start(&store, "routine", 1)?;
    health.needs("database", store.status());
    if let Some(status) = events.status() {
        health.wants("events", status);
    }
    health.all_told();
    let table = Table { store, events };
    let ended = if once {
        clean_up_once(&table, &cleanup).await
    } else {
        clean_up_until(&table, cleanup, live, shutdown).await
    };
    table.events.close().await;
    ended
}

/// The table, and who is told what is deleted from it.
struct Table {
    store: Store,
    events: Emitter,
}

async fn clean_up_until(
    table: &Table,
    mut cleanup: Cleanup,
    mut live: Live<Cleanup>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let store = &table.store;
    let mut interval = every(cleanup.routine_interval);
    let mut steps = Steps::default();
    let mut future_rows = FutureRows::default();
    let mut failing = false;
    loop {
        tokio::select! {
            _ = interval.tick() => {}
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
        // The store says itself when the database is away.
        if store.status().borrow().is_err() {
            continue;
        }
        match clean_up(table, &cleanup, &mut steps, &mut future_rows, &shutdown).await {
            Ok(()) => failing = false,
            Err(error) if failing => tracing::debug!(%error, "cleanup failed again"),
            Err(error) => {
                tracing::warn!(%error, "cleanup failed; trying again with each interval");
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

async fn clean_up_once(table: &Table, config: &Cleanup) -> anyhow::Result<()> {
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
            tracing::debug!("nobody is told what is deleted");
        }
    }
    // There is no earlier reading of the clock to hold this one against.
    let (mut steps, mut future_rows) = (Steps::default(), FutureRows::default());
    clean_up(table, config, &mut steps, &mut future_rows, &CancellationToken::new()).await?;
    Ok(())
}

/// Deletes what is stale, unless the database's clock has stepped lately.
///
/// The clock is read once for all batches, and no statement looks at it again: a step in between
/// deletes nothing.
async fn clean_up(
    table: &Table,
    config: &Cleanup,
    steps: &mut Steps,
    future_rows: &mut FutureRows,
    shutdown: &CancellationToken,
) -> Result<(), StoreError> {
    let asked_at = Instant::now();
    let now = match table.store.now().await {
        Ok(now) => now,
        Err(error) => {
            count("failed");
            return Err(error);
        }
    };
    future_rows.correct(&table.store, config.delete_batch_max).await;
    if let Some(step) = steps.look(now, asked_at, Instant::now()) {
        let pause = config.object_ttl;
        tracing::warn!(?step, ?pause, "the database's clock has stepped ahead; pausing deletions");
    }
    if steps.is_recent(config.object_ttl) {
        count("skipped");
        return Ok(());
    }
    delete(table, now.before(config.object_ttl), config.delete_batch_max, shutdown).await
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
                let gone = |row: &Row| Object { id: row.id, last_seen: row.last_seen.time() };
                table.events.tell(Kind::Gone, rows.iter().map(gone));
                deleted += rows.len() as u64;
                if rows.len() < batch_max as usize || shutdown.is_cancelled() {
                    break Ok(());
                }
            }
            Err(error) => break Err(error),
        }
    };
    if outcome.is_ok() {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        metrics::gauge!(LAST_SUCCESS).set(now.as_secs_f64());
    }
    count(if outcome.is_ok() { "ok" } else { "failed" });
    metrics::counter!("lastseen_deleted_rows_total").increment(deleted);
    metrics::histogram!("lastseen_cleanup_seconds").record(started.elapsed());
    if deleted > 0 {
        tracing::info!(deleted, took = ?started.elapsed(), "deleted stale objects");
    }
    outcome
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
    metrics::describe_histogram!(
        "lastseen_cleanup_seconds",
        metrics::Unit::Seconds,
        "Time that one cleanup took, all of its batches together."
    );
}
