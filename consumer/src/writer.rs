//! Writing results down, many with one statement.

use std::sync::Arc;
use std::time::{Duration, Instant};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use store::{Sighting, Store};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout_at;

use crate::config::Lookups;

/// The batch writer has died; nothing more can be committed by this process.
#[derive(Debug, thiserror::Error)]
#[error("the batch writer has died")]
pub(crate) struct WriterDied;

/// Collects results and commits them in batches. While one batch is being committed the next one
/// gathers, so that batches grow with the load by themselves.
pub(crate) struct Writer {
    results: mpsc::Sender<Seen>,
}

/// One object that was online, and who waits for that to be committed.
struct Seen {
    id: i64,
    at: Instant,
    committed: oneshot::Sender<()>,
}

impl Writer {
    pub(crate) fn start(store: Arc<Store>, config: &Lookups) -> Self {
        describe_metrics();
        let batch_max = usize::from(config.write_batch_max);
        let (results, incoming) = mpsc::channel(batch_max);
        let linger = config.write_batch_linger;
        tokio::spawn(write_batches(store, incoming, batch_max, linger));
        Self { results }
    }

    /// Returns once it is committed that the object was online at `at`, however long that takes.
    ///
    /// # Errors
    /// [`WriterDied`]; then it may not be committed and must not be acked.
    pub(crate) async fn record(&self, id: i64, at: Instant) -> Result<(), WriterDied> {
        let (committed, commit) = oneshot::channel();
        self.results.send(Seen { id, at, committed }).await.map_err(|_| WriterDied)?;
        commit.await.map_err(|_| WriterDied)
    }
}

async fn write_batches(
    store: Arc<Store>,
    mut results: mpsc::Receiver<Seen>,
    batch_max: usize,
    linger: Duration,
) {
    let mut batch = Vec::with_capacity(batch_max);
    while let Some(first) = results.recv().await {
        batch.push(first);
        let flush_at = tokio::time::Instant::now() + linger;
        while batch.len() < batch_max {
            let room = batch_max - batch.len();
            match timeout_at(flush_at, results.recv_many(&mut batch, room)).await {
                // Closed, or the linger is over.
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
        commit(&store, &batch).await;
        for seen in batch.drain(..) {
            // Its delivery may have been lost meanwhile; the row is right all the same.
            let _ = seen.committed.send(());
        }
    }
}

/// Writes the batch, and while the database is away tries again: results wait, unacked, and the
/// prefetch stops the intake.
async fn commit(store: &Store, batch: &[Seen]) {
    let newest = newest_of_each(batch);
    let mut waits = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_millis(700))
        .with_jitter()
        .without_max_times()
        .build();
    let started = Instant::now();
    let mut failures = 0_u32;
    loop {
        // The age is taken anew for each attempt: it counts from now back to the answer.
        let sightings: Vec<Sighting> =
            newest.iter().map(|&(id, at)| Sighting { id, age: at.elapsed() }).collect();
        let Err(error) = store.record_seen(&sightings).await else { break };
        failures += 1;
        metrics::counter!("lastseen_write_failures_total").increment(1);
        if failures == 1 {
            tracing::warn!(%error, rows = newest.len(), "a batch is not written; trying again");
        } else {
            tracing::debug!(%error, failures, "a batch is still not written");
        }
        tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(1))).await;
    }
    if failures > 0 {
        tracing::info!(rows = newest.len(), failures, "the batch is written after all");
    }
    metrics::histogram!("lastseen_write_seconds").record(started.elapsed());
    #[expect(clippy::cast_precision_loss, reason = "a batch has at most 10,000 rows")]
    metrics::histogram!("lastseen_write_batch_rows").record(newest.len() as f64);
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
            committed: oneshot::channel().0,
        };
        let batch = [seen(7, 1), seen(-3, 5), seen(7, 9), seen(7, 4)];
        let newest = newest_of_each(&batch);
        let seconds = |after| start + Duration::from_secs(after);
        assert_eq!(newest, [(-3, seconds(5)), (7, seconds(9))]);
    }
}
