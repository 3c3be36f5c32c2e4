//! Rows that are held up: their deliveries stay unacked, and the rows are retried apart from the
//! batches.
//!
//! Decision: docs/decisions/0037-how-is-a-blocked-row-written.md

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::time::Duration;

use backon::ExponentialBackoff;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::bisection::{self, NotWritten};
use super::{QueuedSighting, Table, WriteOutcome};
use crate::backoff;

/// How long a row is retried before its messages go back to the queue. Until then, the consumer
/// also holds all further deliveries of the object, and RabbitMQ ends the session of a consumer
/// that holds a delivery for 30 minutes.
const HELD_MAX: Duration = Duration::from_mins(2);
const WAIT_MIN: Duration = Duration::from_millis(100);
const WAIT_MAX: Duration = Duration::from_secs(2);

/// The rows that are set aside, by object.
pub(super) struct SetAside {
    /// The most sightings that may wait.
    capacity: usize,
    rows: Mutex<HashMap<i64, Row>>,
    added: Notify,
}

struct Row {
    waiting: Vec<QueuedSighting>,
    since: Instant,
    next_attempt: Instant,
    waits: ExponentialBackoff,
}

impl Row {
    fn schedule_retry(&mut self) {
        self.next_attempt = Instant::now() + self.waits.next().unwrap_or(WAIT_MAX);
    }
}

impl SetAside {
    pub(super) fn new(capacity: usize) -> Self {
        metrics::describe_gauge!(
            "lastseen_rows_set_aside",
            "Objects whose rows are held up, for example by a lock, and are retried."
        );
        metrics::gauge!("lastseen_rows_set_aside").set(0);
        Self { capacity, rows: Mutex::default(), added: Notify::new() }
    }

    /// Whether a sighting can be added.
    pub(super) fn has_capacity(&self) -> bool {
        self.rows.lock().values().map(|row| row.waiting.len()).sum::<usize>() < self.capacity
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.lock().is_empty()
    }

    pub(super) fn contains(&self, id: i64) -> bool {
        self.rows.lock().contains_key(&id)
    }

    /// Holds a sighting until its row is written. Without capacity, its message goes back to the
    /// queue.
    pub(super) fn add(&self, mut sighting: QueuedSighting, reason: &str) {
        if !self.has_capacity() {
            return sighting.report(WriteOutcome::Postponed);
        }
        if let Some(sender) = sighting.set_aside.take() {
            // The receiver may be gone, because its delivery was lost.
            let _ = sender.send(());
        }
        let (id, now) = (sighting.id, Instant::now());
        let rows = &mut *self.rows.lock();
        let is_first = rows.is_empty();
        match rows.entry(id) {
            Entry::Occupied(row) => row.into_mut().waiting.push(sighting),
            Entry::Vacant(entry) => {
                if is_first {
                    tracing::warn!(
                        id,
                        reason,
                        "a row cannot be written now; trying again while other rows are written"
                    );
                } else {
                    tracing::debug!(id, reason, "another row cannot be written now");
                }
                let waits = backoff(WAIT_MIN, WAIT_MAX);
                let mut row = Row { waiting: vec![sighting], since: now, next_attempt: now, waits };
                row.schedule_retry();
                entry.insert(row);
            }
        }
        set_gauge(rows);
        self.added.notify_one();
    }

    /// Retries the rows until they are written. Never returns.
    pub(super) async fn write(&self, table: &Table, batch_max: usize) {
        loop {
            let next = self.rows.lock().values().map(|row| row.next_attempt).min();
            let Some(next) = next else {
                self.added.notified().await;
                continue;
            };
            tokio::select! {
                () = sleep_until(next) => {}
                () = self.added.notified() => continue,
            }
            let due = self.due(batch_max);
            let not_written = bisection::write_set_aside(table, &due).await;
            self.settle(&due, &not_written);
        }
    }

    /// The newest sighting of each object whose next attempt is due, in ascending order of the ids.
    fn due(&self, batch_max: usize) -> Vec<(i64, std::time::Instant)> {
        let now = Instant::now();
        let rows = self.rows.lock();
        let due = rows.iter().filter(|(_, row)| row.next_attempt <= now);
        let mut due: Vec<_> = due
            .filter_map(|(&id, row)| {
                Some((id, row.waiting.iter().map(|sighting| sighting.at).max()?))
            })
            .take(batch_max)
            .collect();
        due.sort_unstable();
        due
    }

    fn settle(&self, due: &[(i64, std::time::Instant)], not_written: &HashMap<i64, NotWritten>) {
        let now = Instant::now();
        let rows = &mut *self.rows.lock();
        for (id, written_until) in due {
            let Entry::Occupied(mut entry) = rows.entry(*id) else { continue };
            let row = entry.get_mut();
            match not_written.get(id) {
                Some(NotWritten::HeldUp(reason)) if row.since + HELD_MAX <= now => {
                    tracing::warn!(
                        id,
                        reason,
                        "a row has been held up for too long; its messages go back to the queue"
                    );
                    for sighting in entry.remove().waiting {
                        sighting.report(WriteOutcome::Postponed);
                    }
                }
                Some(NotWritten::HeldUp(reason)) => {
                    tracing::debug!(id, reason, "a row still cannot be written");
                    row.schedule_retry();
                }
                Some(NotWritten::Refused(reason)) => {
                    for sighting in entry.remove().waiting {
                        sighting.report(WriteOutcome::Refused(reason.clone()));
                    }
                }
                None => {
                    // Newer sightings may have arrived during the write.
                    let done = row.waiting.extract_if(.., |sighting| sighting.at <= *written_until);
                    for sighting in done {
                        sighting.report(WriteOutcome::Committed);
                    }
                    if row.waiting.is_empty() {
                        entry.remove();
                    } else {
                        row.waits = backoff(WAIT_MIN, WAIT_MAX);
                        row.next_attempt = now;
                    }
                }
            }
        }
        if rows.is_empty() {
            tracing::info!("all rows that were held up are written or given back");
        }
        set_gauge(rows);
    }
}

#[expect(clippy::cast_precision_loss, reason = "the number of rows is limited")]
fn set_gauge(rows: &HashMap<i64, Row>) {
    metrics::gauge!("lastseen_rows_set_aside").set(rows.len() as f64);
}
