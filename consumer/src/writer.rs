//! Writes results to the table in batches.

mod bisection;
mod set_aside;

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use messaging::events::{Emitter, Kind, Object};
use runtime::traces::{KeyValue, Span, SpanKind, Step};
use runtime::{CancellationToken, Needed, Status, Supervisor};
use store::{Recorded, Row, Store, StoreError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;

use crate::config::Lookups;
use bisection::NotWritten;
use set_aside::SetAside;

/// The batch writer has stopped; this process can commit no more results.
#[derive(Debug, thiserror::Error)]
#[error("the batch writer stopped")]
pub struct WriterStopped;

/// The outcome of writing a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteOutcome {
    /// The result is in the table, or a newer one is.
    Committed,
    /// The database permanently refuses the row, for this reason.
    Refused(String),
    /// The row has been held up for too long, for example by a lock of another session. Its message
    /// must be delivered again.
    Postponed,
}

/// A result that is not written yet.
pub struct PendingWrite {
    set_aside: oneshot::Receiver<()>,
    outcome: oneshot::Receiver<WriteOutcome>,
}

impl PendingWrite {
    /// Waits for the outcome, without a time limit.
    ///
    /// # Errors
    /// [`WriterStopped`]. The result may not be committed, so its delivery must not be acked.
    pub async fn outcome(self) -> Result<WriteOutcome, WriterStopped> {
        self.outcome.await.map_err(|_| WriterStopped)
    }

    /// Waits for the outcome, but returns `None` if the row is held up and set aside. Other rows
    /// are written meanwhile, and [`PendingWrite::outcome`] may take minutes more.
    ///
    /// # Errors
    /// [`WriterStopped`], as above.
    pub async fn outcome_or_set_aside(&mut self) -> Result<Option<WriteOutcome>, WriterStopped> {
        tokio::select! {
            biased;
            outcome = &mut self.outcome => outcome.map(Some).map_err(|_| WriterStopped),
            // If the row is not set aside, the sender is dropped unused.
            Ok(()) = &mut self.set_aside => Ok(None),
        }
    }
}

/// Collects results and commits them in batches. While one batch is being committed, the next one
/// is collected, so batches grow with the load.
#[derive(Clone)]
pub struct Writer {
    // Declared before `results`, and so dropped first: without `results`, the batch writer ends.
    _needed: Needed,
    results: mpsc::Sender<QueuedSighting>,
    status: watch::Receiver<Status>,
}

/// A sighting that waits for its commit.
struct QueuedSighting {
    id: i64,
    at: Instant,
    /// The span of the wait for the commit.
    span: Span,
    set_aside: Option<oneshot::Sender<()>>,
    outcome: oneshot::Sender<WriteOutcome>,
}

impl QueuedSighting {
    fn report(mut self, outcome: WriteOutcome) {
        match &outcome {
            WriteOutcome::Committed => {}
            WriteOutcome::Refused(reason) => self.span.fail(reason),
            WriteOutcome::Postponed => self.span.fail("the row is held up"),
        }
        // The receiver may be gone, because its delivery was lost. The row is correct nevertheless.
        let _ = self.outcome.send(outcome);
    }
}

impl Writer {
    /// Starts the tokio task that writes batches. From the `shutdown` on, results no longer wait for
    /// their batch to fill up.
    #[must_use]
    pub fn start(
        store: Arc<Store>,
        events: Emitter,
        config: &Lookups,
        supervisor: &Supervisor,
        shutdown: CancellationToken,
    ) -> Self {
        describe_metrics();
        let batch_max = usize::from(config.write_batch_max);
        let fill = Fill { max: batch_max, linger: config.write_batch_linger, shutdown };
        // At most a quarter of the unsettled lookups are set aside, so that other lookups continue.
        let set_aside = SetAside::new(usize::from(config.unsettled_lookups_max() / 4).max(1));
        let (writes, status) = watch::channel(Ok(()));
        let table = Table { store, events, writes };
        let (results, incoming) = mpsc::channel(batch_max);
        let task = supervisor.spawn_critical("batch writer", async move {
            tokio::select! {
                () = write_batches(&table, &set_aside, incoming, fill) => {}
                () = set_aside.write(&table, batch_max) => {}
            }
        });
        Self { _needed: task.detach(), results, status }
    }

    /// Queues the result that the object was online at `at`. `span` is the span of the wait for
    /// [`PendingWrite::outcome`].
    ///
    /// # Errors
    /// [`WriterStopped`].
    pub async fn record(
        &self,
        id: i64,
        at: Instant,
        span: Span,
    ) -> Result<PendingWrite, WriterStopped> {
        let (set_aside, is_set_aside) = oneshot::channel();
        let (sender, outcome) = oneshot::channel();
        let sighting = QueuedSighting { id, at, span, set_aside: Some(set_aside), outcome: sender };
        self.results.send(sighting).await.map_err(|_| WriterStopped)?;
        Ok(PendingWrite { set_aside: is_set_aside, outcome })
    }

    /// Whether the last attempt to write a batch succeeded, or why it failed. The writer retries
    /// until an attempt succeeds.
    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }
}

/// Writes rows, publishes events about the committed changes, and reports failures.
struct Table {
    store: Arc<Store>,
    events: Emitter,
    writes: watch::Sender<Status>,
}

/// When a batch is complete.
struct Fill {
    /// Maximum number of results in a batch.
    max: usize,
    /// How long the first result of a batch waits for others.
    linger: Duration,
    /// Ends the linger. Otherwise the last results would hold up the drain.
    shutdown: CancellationToken,
}

impl Fill {
    /// Adds results to `batch`, which has one, until it is complete.
    async fn collect(
        &self,
        results: &mut mpsc::Receiver<QueuedSighting>,
        batch: &mut Vec<QueuedSighting>,
    ) {
        let mut linger = pin!(sleep(self.linger));
        while batch.len() < self.max {
            let missing = self.max - batch.len();
            tokio::select! {
                // Take the results that are there before checking the linger.
                biased;
                received = results.recv_many(batch, missing) => if received == 0 { return },
                () = &mut linger => return,
                () = self.shutdown.cancelled() => return,
            }
        }
    }
}

async fn write_batches(
    table: &Table,
    set_aside: &SetAside,
    mut results: mpsc::Receiver<QueuedSighting>,
    fill: Fill,
) {
    let mut batch = Vec::with_capacity(fill.max);
    while let Some(first) = results.recv().await {
        batch.push(first);
        fill.collect(&mut results, &mut batch).await;
        // A sighting whose row is already set aside would hold up this batch.
        for sighting in batch.extract_if(.., |sighting| set_aside.contains(sighting.id)) {
            set_aside.add(sighting, "set aside already");
        }
        if batch.is_empty() {
            continue;
        }
        let spans = batch.iter().map(|sighting| &sighting.span);
        let upsert = Span::joint(spans, || table.upsert_step(&batch));
        let not_written = commit(table, set_aside, &batch).await;
        let mut finished = std::mem::replace(&mut batch, Vec::with_capacity(fill.max));
        for sighting in &mut finished {
            sighting.span.link(&upsert);
        }
        let held_up = finished.extract_if(.., |sighting| {
            matches!(not_written.get(&sighting.id), Some(NotWritten::HeldUp(_)))
        });
        for sighting in held_up {
            if let Some(NotWritten::HeldUp(reason)) = not_written.get(&sighting.id) {
                set_aside.add(sighting, reason);
            }
        }
        // Report in a separate tokio task, so that the next batch is written meanwhile.
        tokio::spawn(async move { report(finished, &not_written, upsert) });
    }
}

fn report(batch: Vec<QueuedSighting>, not_written: &HashMap<i64, NotWritten>, upsert: Span) {
    // End the span before any delivery is settled, because the process may end right after that.
    drop(upsert);
    for sighting in batch {
        let outcome = match not_written.get(&sighting.id) {
            Some(NotWritten::Refused(reason)) => WriteOutcome::Refused(reason.clone()),
            Some(NotWritten::HeldUp(_)) => WriteOutcome::Postponed,
            None => WriteOutcome::Committed,
        };
        sighting.report(outcome);
    }
}

/// Writes the batch, and returns the objects whose rows are not committed.
async fn commit(
    table: &Table,
    set_aside: &SetAside,
    batch: &[QueuedSighting],
) -> HashMap<i64, NotWritten> {
    let mut newest = newest_of_each(batch);
    let started = Instant::now();
    let mut locked = HashMap::new();
    if !set_aside.is_empty() {
        // While rows are held up, further ones may be locked. Finding all locked rows is faster
        // than waiting for each of them.
        newest = bisection::without_locked(table, newest, "locked by another session", &mut locked)
            .await;
    }
    let mut not_written = locked;
    if !newest.is_empty() {
        not_written.extend(bisection::write(table, &newest, || set_aside.has_capacity()).await);
    }
    let refused = not_written.values().filter(|why| matches!(why, NotWritten::Refused(_))).count();
    metrics::counter!("lastseen_rows_refused_total").increment(refused as u64);
    metrics::histogram!("lastseen_write_seconds").record(started.elapsed());
    #[expect(clippy::cast_precision_loss, reason = "a batch has at most 10,000 rows")]
    metrics::histogram!("lastseen_write_batch_rows").record(newest.len() as f64);
    not_written
}

impl Table {
    fn upsert_step(&self, batch: &[QueuedSighting]) -> Step {
        let results = i64::try_from(batch.len()).unwrap_or(i64::MAX);
        Step {
            name: "UPSERT object".into(),
            kind: SpanKind::Client,
            attributes: vec![
                KeyValue::new("db.system.name", self.store.system()),
                KeyValue::new("db.collection.name", "object"),
                KeyValue::new("db.operation.name", "UPSERT"),
                KeyValue::new("db.operation.batch.size", results),
            ],
        }
    }

    /// Publishes the committed changes as events. Never waits.
    fn publish_events(&self, recorded: &Recorded) {
        let object = |row: &Row| Object { id: row.id, last_seen: row.last_seen.time() };
        self.events.publish(Kind::Online, recorded.inserted.iter().map(object));
        self.events.publish(Kind::Seen, recorded.updated.iter().map(object));
    }

    fn record_success(&self) {
        self.writes.send_if_modified(|status| std::mem::replace(status, Ok(())).is_err());
    }

    fn record_failure(&self, error: &StoreError, failures: u32, rows: usize) {
        metrics::counter!("lastseen_write_failures_total").increment(1);
        if failures == 1 {
            tracing::warn!(%error, rows, "cannot write a batch; its messages wait, trying again");
        } else {
            tracing::debug!(%error, rows, failures, "still cannot write a batch");
        }
        // If the database is away, the status of the store reports that already.
        let is_reported = self.store.status().borrow().is_err();
        let status = if is_reported {
            Ok(())
        } else {
            Err(format!("the last batch was not written: {error}"))
        };
        _ = self.writes.send_replace(status);
    }
}

/// Each object once, with its newest sighting, in ascending order of the ids.
fn newest_of_each(batch: &[QueuedSighting]) -> Vec<(i64, Instant)> {
    let mut newest: Vec<(i64, Instant)> =
        batch.iter().map(|sighting| (sighting.id, sighting.at)).collect();
    newest
        .sort_unstable_by(|(id, at), (other_id, other_at)| id.cmp(other_id).then(other_at.cmp(at)));
    newest.dedup_by_key(|(id, _)| *id);
    newest
}

fn describe_metrics() {
    metrics::describe_histogram!("lastseen_write_batch_rows", "Rows written by one statement.");
    metrics::describe_histogram!(
        "lastseen_write_seconds",
        metrics::Unit::Seconds,
        "Time to commit a batch, including failed attempts."
    );
    metrics::describe_counter!(
        "lastseen_write_failures_total",
        "Failed attempts to write a batch."
    );
    metrics::describe_counter!("lastseen_rows_refused_total", "Rows that the database refused.");
    metrics::counter!("lastseen_write_failures_total").increment(0);
    metrics::counter!("lastseen_rows_refused_total").increment(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_keeps_the_newest_sighting_of_each_id_in_order() {
        let start = Instant::now();
        let sighting = |id, after| QueuedSighting {
            id,
            at: start + Duration::from_secs(after),
            span: Span::default(),
            set_aside: None,
            outcome: oneshot::channel().0,
        };
        let batch = [sighting(7, 1), sighting(-3, 5), sighting(7, 9), sighting(7, 4)];
        let newest = newest_of_each(&batch);
        let seconds = |after| start + Duration::from_secs(after);
        assert_eq!(newest, [(-3, seconds(5)), (7, seconds(9))]);
    }
}
