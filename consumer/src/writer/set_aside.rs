//! Rows that are held up: their deliveries stay unacked, and the rows are retried apart from the
//! batches.
//!
//! Decision: docs/decisions/0037-how-is-a-blocked-row-written.md

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use super::bisection::{self, NotWritten};
use super::{QueuedSighting, Table, WriteOutcome};

/// How long a row is retried before its messages go back to the queue. Until then, all further
/// deliveries of its object are held as well, and RabbitMQ ends the session of a consumer that
/// holds one for 30 minutes.
const HELD_MAX: Duration = Duration::from_mins(2);
const WAIT_MIN: Duration = Duration::from_millis(100);
const WAIT_MAX: Duration = Duration::from_secs(2);

/// The rows that are set aside, by object.
pub(super) struct SetAside {
    /// How many sightings may wait.
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

fn waits() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(WAIT_MIN)
        .with_max_delay(WAIT_MAX)
        .with_jitter()
        .without_max_times()
        .build()
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
        self.rows().values().map(|row| row.waiting.len()).sum::<usize>() < self.capacity
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows().is_empty()
    }

    pub(super) fn contains(&self, id: i64) -> bool {
        self.rows().contains_key(&id)
    }

    /// Holds a sighting until its row is written. Without capacity, its message goes back to the
    /// queue.
    pub(super) fn add(&self, mut sighting: QueuedSighting, reason: &str) {
        if !self.has_capacity() {
            return sighting.report(WriteOutcome::Postponed);
        }
        sighting.report_set_aside();
        let (id, now) = (sighting.id, Instant::now());
        let rows = &mut *self.rows();
        let is_first = rows.is_empty();
        match rows.entry(id) {
            Entry::Occupied(row) => row.into_mut().waiting.push(sighting),
            Entry::Vacant(entry) => {
                if is_first {
                    tracing::warn!(
                        id,
                        reason,
                        "a row cannot be written now; trying again, without delay for others"
                    );
                } else {
                    tracing::debug!(id, reason, "another row cannot be written now");
                }
                let mut row =
                    Row { waiting: vec![sighting], since: now, next_attempt: now, waits: waits() };
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
            let next = self.rows().values().map(|row| row.next_attempt).min();
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
        let rows = self.rows();
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
        let rows = &mut *self.rows();
        for (id, written_until) in due {
            let Entry::Occupied(mut entry) = rows.entry(*id) else { continue };
            let row = entry.get_mut();
            match not_written.get(id) {
                Some(NotWritten::HeldUp(reason)) if row.since + HELD_MAX <= now => {
                    tracing::warn!(
                        id,
                        reason,
                        "a row could not be written for too long; its messages go back to the queue"
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
                        row.waits = waits();
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

    fn rows(&self) -> MutexGuard<'_, HashMap<i64, Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[expect(clippy::cast_precision_loss, reason = "the number of rows is limited")]
fn set_gauge(rows: &HashMap<i64, Row>) {
    metrics::gauge!("lastseen_rows_set_aside").set(rows.len() as f64);
}
