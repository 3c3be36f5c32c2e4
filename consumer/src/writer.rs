//! Writes results to the table in batches.

mod bisection;
mod set_aside;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use events::{Emitter, Kind, Object};
use service::traces::{KeyValue, Span, SpanKind, Step};
use store::{Recorded, Row, Store, StoreError, StoreStatus};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout_at;

use crate::config::Lookups;
use bisection::NotWritten;
use set_aside::SetAside;

/// The batch writer has stopped; this process can commit no more results.
#[derive(Debug, thiserror::Error)]
#[error("the batch writer stopped")]
pub struct WriterDied;

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
    /// [`WriterDied`]. The result may not be committed, so its delivery must not be acked.
    pub async fn outcome(self) -> Result<WriteOutcome, WriterDied> {
        self.outcome.await.map_err(|_| WriterDied)
    }

    /// Waits for the outcome, but returns `None` if the row is held up and set aside. Other rows
    /// are written meanwhile, and [`PendingWrite::outcome`] may take minutes more.
    ///
    /// # Errors
    /// [`WriterDied`], as above.
    pub async fn outcome_or_set_aside(&mut self) -> Result<Option<WriteOutcome>, WriterDied> {
        tokio::select! {
            biased;
            outcome = &mut self.outcome => outcome.map(Some).map_err(|_| WriterDied),
            // If the row is not set aside, the sender is dropped unused.
            Ok(()) = &mut self.set_aside => Ok(None),
        }
    }
}

/// Collects results and commits them in batches. While one batch is being committed, the next one
/// is collected, so batches grow with the load.
#[derive(Clone)]
pub struct Writer {
    results: mpsc::Sender<QueuedSighting>,
    status: watch::Receiver<StoreStatus>,
}

/// A sighting that waits for its commit.
struct QueuedSighting {
    id: i64,
    at: Instant,
    /// The span of the wait.
    commit: Span,
    set_aside: Option<oneshot::Sender<()>>,
    outcome: oneshot::Sender<WriteOutcome>,
}

impl QueuedSighting {
    /// Reports that the row is set aside.
    fn report_set_aside(&mut self) {
        if let Some(sender) = self.set_aside.take() {
            // The receiver may be gone, because its delivery was lost.
            let _ = sender.send(());
        }
    }

    fn report(mut self, outcome: WriteOutcome) {
        match &outcome {
            WriteOutcome::Committed => {}
            WriteOutcome::Refused(reason) => self.commit.fail(reason),
            WriteOutcome::Postponed => self.commit.fail("the row is held up"),
        }
        // The receiver may be gone, because its delivery was lost; the row is correct anyway.
        let _ = self.outcome.send(outcome);
    }
}

impl Writer {
    /// Starts the task that writes batches.
    #[must_use]
    pub fn start(store: Arc<Store>, events: Emitter, config: &Lookups) -> Self {
        describe_metrics();
        let batch_max = usize::from(config.write_batch_max);
        let linger = config.write_batch_linger;
        // A quarter of the unsettled lookups, so that the other lookups continue.
        let set_aside = SetAside::new(usize::from(config.unsettled_lookups_max() / 4).max(1));
        let (writes, status) = watch::channel(Ok(()));
        let table = Table { store, events, writes };
        Self::with_task(batch_max, status, async move |results| {
            tokio::select! {
                () = write_batches(&table, &set_aside, results, batch_max, linger) => {}
                () = set_aside.write(&table, batch_max) => {}
            }
        })
    }

    fn with_task<F: Future<Output = ()> + Send + 'static>(
        capacity: usize,
        status: watch::Receiver<StoreStatus>,
        write: impl FnOnce(mpsc::Receiver<QueuedSighting>) -> F,
    ) -> Self {
        let (results, incoming) = mpsc::channel(capacity);
        tokio::spawn(write(incoming));
        Self { results, status }
    }

    /// Queues the result that the object was online at `at`. `commit` is the span of the wait for
    /// [`PendingWrite::outcome`].
    ///
    /// # Errors
    /// [`WriterDied`].
    pub async fn record(
        &self,
        id: i64,
        at: Instant,
        commit: Span,
    ) -> Result<PendingWrite, WriterDied> {
        let (set_aside, is_set_aside) = oneshot::channel();
        let (sender, outcome) = oneshot::channel();
        let sighting =
            QueuedSighting { id, at, commit, set_aside: Some(set_aside), outcome: sender };
        self.results.send(sighting).await.map_err(|_| WriterDied)?;
        Ok(PendingWrite { set_aside: is_set_aside, outcome })
    }

    /// Whether the last attempt to write a batch succeeded, or why not. The writer retries until it
    /// does.
    pub(crate) fn status(&self) -> watch::Receiver<StoreStatus> {
        self.status.clone()
    }

    /// Returns only if the task has stopped.
    pub(crate) async fn died(&self) {
        self.results.closed().await;
    }
}

/// The table, and the events about its changes.
struct Table {
    store: Arc<Store>,
    events: Emitter,
    writes: watch::Sender<StoreStatus>,
}

async fn write_batches(
    table: &Table,
    set_aside: &SetAside,
    mut results: mpsc::Receiver<QueuedSighting>,
    batch_max: usize,
    linger: Duration,
) {
    let mut batch = Vec::with_capacity(batch_max);
    while let Some(first) = results.recv().await {
        batch.push(first);
        let now = tokio::time::Instant::now();
        let flush_at = now.checked_add(linger).unwrap_or(now);
        while batch.len() < batch_max {
            let missing = batch_max - batch.len();
            match timeout_at(flush_at, results.recv_many(&mut batch, missing)).await {
                // The channel is closed, or the linger is over.
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        // Sightings of rows that are set aside would hold up this batch.
        for sighting in batch.extract_if(.., |sighting| set_aside.contains(sighting.id)) {
            set_aside.add(sighting, "set aside already");
        }
        if batch.is_empty() {
            continue;
        }
        let waits = batch.iter().map(|sighting| &sighting.commit);
        let upsert = Span::joint(waits, || table.upsert_step(&batch));
        let not_written = commit(table, set_aside, &batch).await;
        let mut finished = std::mem::replace(&mut batch, Vec::with_capacity(batch_max));
        for sighting in &mut finished {
            sighting.commit.link(&upsert);
        }
        let held_up = finished.extract_if(.., |sighting| {
            matches!(not_written.get(&sighting.id), Some(NotWritten::HeldUp(_)))
        });
        for sighting in held_up {
            if let Some(NotWritten::HeldUp(reason)) = not_written.get(&sighting.id) {
                set_aside.add(sighting, reason);
            }
        }
        // In a task of its own, so that the next batch is written meanwhile.
        tokio::spawn(async move { report(finished, &not_written, upsert) });
    }
}

fn report(batch: Vec<QueuedSighting>, not_written: &HashMap<i64, NotWritten>, upsert: Span) {
    // Ends the span before any delivery is settled, because the process may end then.
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
        // If some rows are locked, more may be. Finding them is faster than waiting for each.
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
    /// The span of the statement for a batch.
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
    fn announce(&self, recorded: &Recorded) {
        let object = |row: &Row| Object { id: row.id, last_seen: row.last_seen.time() };
        self.events.publish(Kind::Online, recorded.inserted.iter().map(object));
        self.events.publish(Kind::Seen, recorded.updated.iter().map(object));
    }

    fn note_success(&self) {
        self.writes.send_if_modified(|status| std::mem::replace(status, Ok(())).is_err());
    }

    fn note_failure(&self, error: &StoreError, failures: u32, rows: usize) {
        metrics::counter!("lastseen_write_failures_total").increment(1);
        if failures == 1 {
            tracing::warn!(%error, rows, "cannot write a batch; its messages wait, trying again");
        } else {
            tracing::debug!(%error, rows, failures, "still cannot write a batch");
        }
        // The store reports an outage of the database itself.
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
            commit: Span::default(),
            set_aside: None,
            outcome: oneshot::channel().0,
        };
        let batch = [sighting(7, 1), sighting(-3, 5), sighting(7, 9), sighting(7, 4)];
        let newest = newest_of_each(&batch);
        let seconds = |after| start + Duration::from_secs(after);
        assert_eq!(newest, [(-3, seconds(5)), (7, seconds(9))]);
    }

    #[tokio::test]
    async fn a_panic_of_the_writer_is_reported_to_its_users() {
        let (_, status) = watch::channel(Ok(()));
        let writer = Writer::with_task(1, status, async |mut results| {
            let _first = results.recv().await;
            panic!("the writer panics in this test");
        });
        let record =
            async { writer.record(42, Instant::now(), Span::default()).await?.outcome().await };
        let (died, recorded) = tokio::join!(writer.died(), record);
        assert!(matches!((died, recorded), ((), Err(WriterDied))));
    }
}
