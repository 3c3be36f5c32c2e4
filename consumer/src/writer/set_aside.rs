//! Rows that something holds up: kept unacked and tried again beside the batches.
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
use super::{Seen, Table, Written};

/// How long a row is held before its messages go back to the broker. Until then, every further
/// message of its object is held as well, and RabbitMQ ends the session of a consumer that holds one
/// for 30 minutes.
const HELD_MAX: Duration = Duration::from_mins(2);
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// The rows that are set aside, by object.
pub(super) struct SetAside {
    /// How many results may be held.
    room: usize,
    rows: Mutex<HashMap<i64, Row>>,
    added: Notify,
}

struct Row {
    waiting: Vec<Seen>,
    since: Instant,
    next_attempt: Instant,
    waits: ExponentialBackoff,
}

impl Row {
    fn wait_again(&mut self) {
        self.next_attempt = Instant::now() + self.waits.next().unwrap_or(LONGEST_WAIT);
    }
}

fn waits() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(FIRST_WAIT)
        .with_max_delay(LONGEST_WAIT)
        .with_jitter()
        .without_max_times()
        .build()
}

impl SetAside {
    pub(super) fn new(room: usize) -> Self {
        metrics::describe_gauge!(
            "lastseen_rows_set_aside",
            "Objects whose rows are held up, as by another session's lock, and tried again by themselves."
        );
        metrics::gauge!("lastseen_rows_set_aside").set(0);
        Self { room, rows: Mutex::default(), added: Notify::new() }
    }

    /// Whether a result can be added.
    pub(super) fn has_room(&self) -> bool {
        self.rows().values().map(|row| row.waiting.len()).sum::<usize>() < self.room
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows().is_empty()
    }

    pub(super) fn contains(&self, id: i64) -> bool {
        self.rows().contains_key(&id)
    }

    /// Holds a result until its row is written. Without room, its message goes back to the broker.
    pub(super) fn add(&self, mut seen: Seen, reason: &str) {
        if !self.has_room() {
            return seen.answer(Written::Postponed);
        }
        seen.set_aside();
        let (id, now) = (seen.id, Instant::now());
        let rows = &mut *self.rows();
        let is_first = rows.is_empty();
        match rows.entry(id) {
            Entry::Occupied(row) => row.into_mut().waiting.push(seen),
            Entry::Vacant(place) => {
                if is_first {
                    tracing::warn!(
                        id,
                        reason,
                        "a row cannot be written now; others go on without it"
                    );
                } else {
                    tracing::debug!(id, reason, "one more row cannot be written now");
                }
                let mut row =
                    Row { waiting: vec![seen], since: now, next_attempt: now, waits: waits() };
                row.wait_again();
                place.insert(row);
            }
        }
        set_gauge(rows);
        self.added.notify_one();
    }

    /// Writes the rows when nothing holds them up any more. Never returns.
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

    /// Each object that is due, in ascending order, with its newest sighting.
    fn due(&self, batch_max: usize) -> Vec<(i64, std::time::Instant)> {
        let now = Instant::now();
        let rows = self.rows();
        let due = rows.iter().filter(|(_, row)| row.next_attempt <= now);
        let mut due: Vec<_> = due
            .filter_map(|(&id, row)| Some((id, row.waiting.iter().map(|seen| seen.at).max()?)))
            .take(batch_max)
            .collect();
        due.sort_unstable();
        due
    }

    fn settle(&self, due: &[(i64, std::time::Instant)], not_written: &HashMap<i64, NotWritten>) {
        let now = Instant::now();
        let rows = &mut *self.rows();
        for (id, written_until) in due {
            let Entry::Occupied(mut place) = rows.entry(*id) else { continue };
            let row = place.get_mut();
            match not_written.get(id) {
                Some(NotWritten::HeldUp(reason)) if row.since + HELD_MAX <= now => {
                    tracing::warn!(
                        id,
                        reason,
                        "a row could not be written; its messages go back to the queue"
                    );
                    for seen in place.remove().waiting {
                        seen.answer(Written::Postponed);
                    }
                }
                Some(NotWritten::HeldUp(reason)) => {
                    tracing::debug!(id, reason, "a row still cannot be written");
                    row.wait_again();
                }
                Some(NotWritten::Refused(reason)) => {
                    for seen in place.remove().waiting {
                        seen.answer(Written::Refused(reason.clone()));
                    }
                }
                None => {
                    // Newer ones have come while it was written.
                    let done = row.waiting.extract_if(.., |seen| seen.at <= *written_until);
                    for seen in done {
                        seen.answer(Written::Committed);
                    }
                    if row.waiting.is_empty() {
                        place.remove();
                    } else {
                        row.waits = waits();
                        row.next_attempt = now;
                    }
                }
            }
        }
        if rows.is_empty() {
            tracing::info!("no row is held up any more");
        }
        set_gauge(rows);
    }

    fn rows(&self) -> MutexGuard<'_, HashMap<i64, Row>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[expect(clippy::cast_precision_loss, reason = "their number is bounded")]
fn set_gauge(rows: &HashMap<i64, Row>) {
    metrics::gauge!("lastseen_rows_set_aside").set(rows.len() as f64);
}
