//! Writing results down, many with one statement.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use events::{Emitter, Kind, Object};
use service::traces::{KeyValue, Span, SpanKind, Step};
use store::{Recorded, Row, Sighting, Store, StoreError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout_at;

use crate::config::Lookups;

/// The batch writer has died; nothing more can be committed by this process.
#[derive(Debug, thiserror::Error)]
#[error("the batch writer has died")]
pub struct WriterDied;

/// What has become of a result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Written {
    /// It is in the table, or a newer one is.
    Committed,
    /// The database will never take this row, for this reason.
    Refused(String),
}

/// Collects results and commits them in batches. While one batch is being committed the next one
/// gathers, so that batches grow with the load by themselves.
#[derive(Clone)]
pub struct Writer {
    results: mpsc::Sender<Seen>,
}

/// One object that was online, and who waits for that to be committed.
struct Seen {
    id: i64,
    at: Instant,
    /// The wait, in the trace of what is waited for.
    commit: Span,
    written: oneshot::Sender<Written>,
}

impl Writer {
    /// Starts the task that writes.
    #[must_use]
    pub fn start(store: Arc<Store>, events: Emitter, config: &Lookups) -> Self {
        describe_metrics();
        let batch_max = usize::from(config.write_batch_max);
        let linger = config.write_batch_linger;
        Self::served_by(batch_max, |results| {
            write_batches(Table { store, events }, results, batch_max, linger)
        })
    }

    fn served_by<F: Future<Output = ()> + Send + 'static>(
        waiting_max: usize,
        write: impl FnOnce(mpsc::Receiver<Seen>) -> F,
    ) -> Self {
        let (results, incoming) = mpsc::channel(waiting_max);
        tokio::spawn(write(incoming));
        Self { results }
    }

    /// Returns once it is committed that the object was online at `at`, or refused for good, however
    /// long that takes. `commit` is the span of the wait.
    ///
    /// # Errors
    /// [`WriterDied`]; then it may not be committed and must not be acked.
    pub async fn record(&self, id: i64, at: Instant, commit: Span) -> Result<Written, WriterDied> {
        let (written, outcome) = oneshot::channel();
        self.results.send(Seen { id, at, commit, written }).await.map_err(|_| WriterDied)?;
        outcome.await.map_err(|_| WriterDied)
    }

    /// Returns only if what writes has died.
    pub(crate) async fn died(&self) {
        self.results.closed().await;
    }
}

/// Where results are written, and who is told of it.
struct Table {
    store: Arc<Store>,
    events: Emitter,
}

async fn write_batches(
    table: Table,
    mut results: mpsc::Receiver<Seen>,
    batch_max: usize,
    linger: Duration,
) {
    let mut batch = Vec::with_capacity(batch_max);
    while let Some(first) = results.recv().await {
        batch.push(first);
        let now = tokio::time::Instant::now();
        let flush_at = now.checked_add(linger).unwrap_or(now);
        while batch.len() < batch_max {
            let room = batch_max - batch.len();
            match timeout_at(flush_at, results.recv_many(&mut batch, room)).await {
                // Closed, or the linger is over.
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        let upsert = Span::joint(batch.iter().map(|seen| &seen.commit), || table.upsert(&batch));
        let refused = commit(&table, &batch).await;
        let answered = std::mem::replace(&mut batch, Vec::with_capacity(batch_max));
        // While it is told, the next batch is written.
        tokio::spawn(async move { tell(answered, &refused, upsert) });
    }
}

fn tell(mut batch: Vec<Seen>, refused: &HashMap<i64, String>, upsert: Span) {
    for seen in &mut batch {
        seen.commit.link(&upsert);
    }
    // Before anybody hears of it, and maybe ends the process.
    drop(upsert);
    for mut seen in batch {
        let reason = refused.get(&seen.id).cloned();
        if let Some(reason) = &reason {
            seen.commit.fail(reason);
        }
        let written = reason.map_or(Written::Committed, Written::Refused);
        // Its delivery may have been lost meanwhile; the row is right all the same.
        let _ = seen.written.send(written);
    }
}

/// Writes the batch, and while the database is away tries again: results wait, unacked, and the
/// room for lookups that have begun stops the next ones.
///
/// Returns the objects whose rows the database refuses, with its reasons. They are found by halving:
/// each half is committed or halved on, so one bad row among 1,000 costs some twenty statements.
async fn commit(table: &Table, batch: &[Seen]) -> HashMap<i64, String> {
    let newest = newest_of_each(batch);
    let mut waits = broker::backoff();
    let started = Instant::now();
    let mut failures = 0_u32;
    let mut refused = HashMap::new();
    let mut parts = vec![newest.as_slice()];
    while let Some(rows) = parts.pop() {
        // The age is taken anew for each attempt: it counts from now back to the answer.
        let sightings: Vec<Sighting> =
            rows.iter().map(|&(id, at)| Sighting { id, age: at.elapsed() }).collect();
        match (table.store.record_seen(&sightings).await, rows) {
            (Ok(recorded), _) => {
                table.tell(&recorded);
                waits = broker::backoff();
            }
            (Err(error @ StoreError::Refused(_)), &[(id, _)]) => {
                let reason = error.to_string();
                tracing::warn!(id, reason, "not written");
                refused.insert(id, reason);
            }
            (Err(StoreError::Refused(_)), rows) => {
                let (first, second) = rows.split_at(rows.len() / 2);
                parts.extend([second, first]);
            }
            (Err(error), rows) => {
                failures += 1;
                metrics::counter!("lastseen_write_failures_total").increment(1);
                if failures == 1 {
                    tracing::warn!(%error, rows = rows.len(), "a batch is not written; trying again");
                } else {
                    tracing::debug!(%error, failures, "a batch is still not written");
                }
                parts.push(rows);
                tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(1))).await;
            }
        }
    }
    if failures > 0 {
        tracing::info!(rows = newest.len(), failures, "the batch is written after all");
    }
    metrics::counter!("lastseen_rows_refused_total").increment(refused.len() as u64);
    metrics::histogram!("lastseen_write_seconds").record(started.elapsed());
    #[expect(clippy::cast_precision_loss, reason = "a batch has at most 10,000 rows")]
    metrics::histogram!("lastseen_write_batch_rows").record(newest.len() as f64);
    refused
}

impl Table {
    /// The statement for a batch, as traces have it.
    fn upsert(&self, batch: &[Seen]) -> Step {
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

    /// Tells those who want to know; this never waits.
    fn tell(&self, recorded: &Recorded) {
        let object = |row: &Row| Object { id: row.id, last_seen: row.last_seen.time() };
        self.events.tell(Kind::Online, recorded.inserted.iter().map(object));
        self.events.tell(Kind::Seen, recorded.updated.iter().map(object));
    }
}

/// Each object once, with its newest sighting, in ascending order of the ids: the order in which
/// every process locks rows, so that none waits for another in a circle.
fn newest_of_each(batch: &[Seen]) -> Vec<(i64, Instant)> {
    let mut newest: Vec<(i64, Instant)> = batch.iter().map(|seen| (seen.id, seen.at)).collect();
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
        "Time to commit a batch, failed attempts included."
    );
    metrics::describe_counter!("lastseen_write_failures_total", "Attempts at a batch that failed.");
    metrics::describe_counter!("lastseen_rows_refused_total", "Rows that the database refused.");
    metrics::counter!("lastseen_write_failures_total").increment(0);
    metrics::counter!("lastseen_rows_refused_total").increment(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_repeated_objects_the_newest_sighting_is_kept_and_the_ids_ascend() {
        let start = Instant::now();
        let seen = |id, after| Seen {
            id,
            at: start + Duration::from_secs(after),
            commit: Span::default(),
            written: oneshot::channel().0,
        };
        let batch = [seen(7, 1), seen(-3, 5), seen(7, 9), seen(7, 4)];
        let newest = newest_of_each(&batch);
        let seconds = |after| start + Duration::from_secs(after);
        assert_eq!(newest, [(-3, seconds(5)), (7, seconds(9))]);
    }

    #[tokio::test]
    async fn a_writer_that_panics_is_noticed_by_all_who_depend_on_it() {
        let writer = Writer::served_by(1, async |mut results| {
            let _first = results.recv().await;
            panic!("this one panics");
        });
        let (died, recorded) =
            tokio::join!(writer.died(), writer.record(42, Instant::now(), Span::default()));
        assert!(matches!((died, recorded), ((), Err(WriterDied))));
    }
}
