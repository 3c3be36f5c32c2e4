//! Writing results to the table, many with one statement.

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
    /// Something has been in the row's way for too long, as another session's lock: its message must
    /// be delivered again.
    Postponed,
}

/// A result on its way into the table.
pub struct Recording {
    set_aside: oneshot::Receiver<()>,
    written: oneshot::Receiver<Written>,
}

impl Recording {
    /// Returns once it is committed, or refused for good, or postponed, however long that takes.
    ///
    /// # Errors
    /// [`WriterDied`]; then it may not be committed and must not be acked.
    pub async fn written(self) -> Result<Written, WriterDied> {
        self.written.await.map_err(|_| WriterDied)
    }

    /// The same, but `None` as soon as the row is set aside: it is held up, others are written
    /// meanwhile, and [`Recording::written`] may take minutes more.
    ///
    /// # Errors
    /// [`WriterDied`], as above.
    pub async fn written_or_set_aside(&mut self) -> Result<Option<Written>, WriterDied> {
        tokio::select! {
            biased;
            written = &mut self.written => written.map(Some).map_err(|_| WriterDied),
            // The sender is dropped unused when the result is answered.
            Ok(()) = &mut self.set_aside => Ok(None),
        }
    }
}

/// Collects results and commits them in batches. While one batch is being committed the next one
/// gathers, so that batches grow with the load by themselves.
#[derive(Clone)]
pub struct Writer {
    results: mpsc::Sender<Seen>,
    status: watch::Receiver<StoreStatus>,
}

/// One object that was online, and who waits for that to be committed.
struct Seen {
    id: i64,
    at: Instant,
    /// The wait, in the trace of what is waited for.
    commit: Span,
    set_aside: Option<oneshot::Sender<()>>,
    written: oneshot::Sender<Written>,
}

impl Seen {
    /// Reports that its row is held up.
    fn set_aside(&mut self) {
        if let Some(sender) = self.set_aside.take() {
            // Its delivery may have been lost meanwhile.
            let _ = sender.send(());
        }
    }

    fn answer(mut self, written: Written) {
        match &written {
            Written::Committed => {}
            Written::Refused(reason) => self.commit.fail(reason),
            Written::Postponed => self.commit.fail("the row is held up"),
        }
        // Its delivery may have been lost meanwhile; the row is right all the same.
        let _ = self.written.send(written);
    }
}

impl Writer {
    /// Starts the task that writes.
    #[must_use]
    pub fn start(store: Arc<Store>, events: Emitter, config: &Lookups) -> Self {
        describe_metrics();
        let batch_max = usize::from(config.write_batch_max);
        let linger = config.write_batch_linger;
        // Lookups go on with the rest.
        let set_aside = SetAside::new(usize::from(config.begun_max() / 4).max(1));
        let (writes, status) = watch::channel(Ok(()));
        let table = Table { store, events, writes };
        Self::served_by(batch_max, status, async move |results| {
            tokio::select! {
                () = write_batches(&table, &set_aside, results, batch_max, linger) => {}
                () = set_aside.write(&table, batch_max) => {}
            }
        })
    }

    fn served_by<F: Future<Output = ()> + Send + 'static>(
        waiting_max: usize,
        status: watch::Receiver<StoreStatus>,
        write: impl FnOnce(mpsc::Receiver<Seen>) -> F,
    ) -> Self {
        let (results, incoming) = mpsc::channel(waiting_max);
        tokio::spawn(write(incoming));
        Self { results, status }
    }

    /// Takes the result that the object was online at `at`. `commit` is the span of the wait for
    /// [`Recording::written`].
    ///
    /// # Errors
    /// [`WriterDied`].
    pub async fn record(
        &self,
        id: i64,
        at: Instant,
        commit: Span,
    ) -> Result<Recording, WriterDied> {
        let (set_aside, is_set_aside) = oneshot::channel();
        let (written, outcome) = oneshot::channel();
        let seen = Seen { id, at, commit, set_aside: Some(set_aside), written };
        self.results.send(seen).await.map_err(|_| WriterDied)?;
        Ok(Recording { set_aside: is_set_aside, written: outcome })
    }

    /// Whether the last batch could be written, or why not. The writer tries again until it can.
    pub(crate) fn status(&self) -> watch::Receiver<StoreStatus> {
        self.status.clone()
    }

    /// Returns only if what writes has died.
    pub(crate) async fn died(&self) {
        self.results.closed().await;
    }
}

/// Where results are written, and where commits are announced.
struct Table {
    store: Arc<Store>,
    events: Emitter,
    writes: watch::Sender<StoreStatus>,
}

async fn write_batches(
    table: &Table,
    set_aside: &SetAside,
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
        // What waits for a row that is set aside waits with it, or it would hold up this batch.
        for seen in batch.extract_if(.., |seen| set_aside.contains(seen.id)) {
            set_aside.add(seen, "set aside already");
        }
        if batch.is_empty() {
            continue;
        }
        let upsert = Span::joint(batch.iter().map(|seen| &seen.commit), || table.upsert(&batch));
        let not_written = commit(table, set_aside, &batch).await;
        let mut answered = std::mem::replace(&mut batch, Vec::with_capacity(batch_max));
        for seen in &mut answered {
            seen.commit.link(&upsert);
        }
        let held_up = answered.extract_if(.., |seen| {
            matches!(not_written.get(&seen.id), Some(NotWritten::HeldUp(_)))
        });
        for seen in held_up {
            if let Some(NotWritten::HeldUp(reason)) = not_written.get(&seen.id) {
                set_aside.add(seen, reason);
            }
        }
        // The next batch is written meanwhile.
        tokio::spawn(async move { answer(answered, &not_written, upsert) });
    }
}

fn answer(batch: Vec<Seen>, not_written: &HashMap<i64, NotWritten>, upsert: Span) {
    // Before any delivery is settled, which may end the process.
    drop(upsert);
    for seen in batch {
        let written = match not_written.get(&seen.id) {
            Some(NotWritten::Refused(reason)) => Written::Refused(reason.clone()),
            Some(NotWritten::HeldUp(_)) => Written::Postponed,
            None => Written::Committed,
        };
        seen.answer(written);
    }
}

/// Writes the batch, and returns the objects whose rows are not committed.
async fn commit(table: &Table, set_aside: &SetAside, batch: &[Seen]) -> HashMap<i64, NotWritten> {
    let mut newest = newest_of_each(batch);
    let started = Instant::now();
    let mut locked = HashMap::new();
    if !set_aside.is_empty() {
        // Where some rows are locked, more may be: look, rather than wait for each.
        newest =
            bisection::without_locked(table, newest, "locked by another session", &mut locked).await;
    }
    let mut not_written = locked;
    if !newest.is_empty() {
        not_written.extend(bisection::write(table, &newest, || set_aside.has_room()).await);
    }
    let refused = not_written.values().filter(|why| matches!(why, NotWritten::Refused(_))).count();
    metrics::counter!("lastseen_rows_refused_total").increment(refused as u64);
    metrics::histogram!("lastseen_write_seconds").record(started.elapsed());
    #[expect(clippy::cast_precision_loss, reason = "a batch has at most 10,000 rows")]
    metrics::histogram!("lastseen_write_batch_rows").record(newest.len() as f64);
    not_written
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

    /// Announces what was committed; this never waits.
    fn announce(&self, recorded: &Recorded) {
        let object = |row: &Row| Object { id: row.id, last_seen: row.last_seen.time() };
        self.events.tell(Kind::Online, recorded.inserted.iter().map(object));
        self.events.tell(Kind::Seen, recorded.updated.iter().map(object));
    }

    fn writes_work(&self) {
        self.writes.send_if_modified(|status| std::mem::replace(status, Ok(())).is_err());
    }

    fn writes_fail(&self, error: &StoreError, failures: u32, rows: usize) {
        metrics::counter!("lastseen_write_failures_total").increment(1);
        if failures == 1 {
            tracing::warn!(%error, rows, "a batch is not written; trying again");
        } else {
            tracing::debug!(%error, rows, failures, "a batch is still not written");
        }
        // An outage that the store reports by itself is no further reason.
        let is_known = self.store.status().borrow().is_err();
        let status = if is_known { Ok(()) } else { Err(format!("takes no writes: {error}")) };
        _ = self.writes.send_replace(status);
    }
}

/// Each object once, with its newest sighting, in ascending order of the ids.
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
            set_aside: None,
            written: oneshot::channel().0,
        };
        let batch = [seen(7, 1), seen(-3, 5), seen(7, 9), seen(7, 4)];
        let newest = newest_of_each(&batch);
        let seconds = |after| start + Duration::from_secs(after);
        assert_eq!(newest, [(-3, seconds(5)), (7, seconds(9))]);
    }

    #[tokio::test]
    async fn a_writer_that_panics_is_noticed_by_all_who_depend_on_it() {
        let (_, status) = watch::channel(Ok(()));
        let writer = Writer::served_by(1, status, async |mut results| {
            let _first = results.recv().await;
            panic!("this one panics");
        });
        let record =
            async { writer.record(42, Instant::now(), Span::default()).await?.written().await };
        let (died, recorded) = tokio::join!(writer.died(), record);
        assert!(matches!((died, recorded), ((), Err(WriterDied))));
    }
}
