//! Writing a batch by parts, so that a row that cannot be written takes no other with it.
//!
//! Decision: docs/decisions/0036-how-are-database-errors-classified.md

use std::collections::HashMap;
use std::time::{Duration, Instant};

use store::{Failure, Recorded, Sighting, StoreError};

use super::Table;

/// How often a single row fails with what may concern the whole database before it counts as the
/// row's own fault.
const ATTEMPTS_OF_ONE_ROW: u32 = 3;

/// Why a row is not committed.
pub(super) enum NotWritten {
    /// The database will never take it.
    Refused(String),
    /// Something is in its way now.
    HeldUp(String),
}

/// Objects and when they were seen, in ascending order of the ids: the order in which every process
/// locks rows, so that none waits for another in a circle.
pub(super) type Rows = [(i64, Instant)];

/// Commits all rows of the batch but those that it returns. While the database is away it tries
/// again: results wait, unacked, and the limit on begun lookups stops the next ones.
///
/// A part that fails is halved: each half is committed or halved on, so one bad row among 1,000 costs
/// some twenty statements. Rows that are locked are found by one statement.
///
/// `may_set_aside` says whether there is room for a row that fails for reasons which may concern all
/// rows; without it, such a row is tried again here.
pub(super) async fn write(
    table: &Table,
    batch: &Rows,
    may_set_aside: impl Fn() -> bool,
) -> HashMap<i64, NotWritten> {
    let mut waits = broker::backoff();
    let mut failures = 0_u32;
    let mut not_written = HashMap::new();
    let mut parts = vec![(batch.to_vec(), 0)];
    let mut record = Record::Usually;
    while let Some((rows, failed)) = parts.pop() {
        let Err(error) = record.record(table, &rows).await else {
            table.writes_work();
            waits = broker::backoff();
            continue;
        };
        let is_single = rows.len() == 1;
        let failure = error.failure();
        match failure {
            Failure::RefusedRow if is_single => {
                let (id, reason) = (rows[0].0, error.to_string());
                tracing::warn!(
                    id,
                    reason,
                    "the database refuses a row; its messages become dead letters"
                );
                not_written.insert(id, NotWritten::Refused(reason));
            }
            Failure::BusyRow => {
                record = Record::Briefly;
                let free = set_locked_aside(table, rows, &error, &mut not_written).await;
                match free.as_slice() {
                    [] => {}
                    // Not locked, and still held up, as by a trigger or a row that is being inserted.
                    &[(id, _)] if is_single => {
                        not_written.insert(id, NotWritten::HeldUp(error.to_string()));
                    }
                    _ => push_halves(&mut parts, &free),
                }
            }
            Failure::RefusedRow => push_halves(&mut parts, &rows),
            Failure::Connection | Failure::Database => {
                failures += 1;
                table.writes_fail(&error, failures, rows.len());
                tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(1))).await;
                if failure == Failure::Connection {
                    parts.push((rows, failed));
                } else if !is_single {
                    push_halves(&mut parts, &rows);
                } else if failed + 1 >= ATTEMPTS_OF_ONE_ROW && may_set_aside() {
                    not_written.insert(rows[0].0, NotWritten::HeldUp(error.to_string()));
                } else {
                    parts.push((rows, failed + 1));
                }
            }
        }
    }
    // What could not be written is no longer the batch's concern.
    table.writes_work();
    if failures > 0 {
        tracing::info!(rows = batch.len(), failures, "a batch that had failed is written");
    }
    not_written
}

/// Tries rows that were set aside, without waiting for the database: they are tried again later.
pub(super) async fn write_set_aside(table: &Table, batch: &Rows) -> HashMap<i64, NotWritten> {
    let mut not_written = HashMap::new();
    let free =
        without_locked(table, batch.to_vec(), "locked by another session", &mut not_written).await;
    let mut parts = vec![free];
    while let Some(rows) = parts.pop().filter(|rows| !rows.is_empty()) {
        let record = if rows.len() == 1 { Record::Usually } else { Record::Briefly };
        let Err(error) = record.record(table, &rows).await else { continue };
        match error.failure() {
            Failure::RefusedRow | Failure::BusyRow | Failure::Database if rows.len() > 1 => {
                let (first, second) = rows.split_at(rows.len() / 2);
                parts.extend([second.to_vec(), first.to_vec()]);
            }
            Failure::RefusedRow => {
                not_written.extend(
                    rows.iter().map(|(id, _)| (*id, NotWritten::Refused(error.to_string()))),
                );
            }
            Failure::BusyRow | Failure::Database | Failure::Connection => {
                let held_up =
                    |(id, _): &(i64, Instant)| (*id, NotWritten::HeldUp(error.to_string()));
                not_written.extend(rows.iter().map(held_up));
            }
        }
    }
    not_written
}

/// Finds which of a batch are locked before it waits for one of them.
pub(super) async fn without_locked(
    table: &Table,
    mut rows: Vec<(i64, Instant)>,
    reason: &str,
    not_written: &mut HashMap<i64, NotWritten>,
) -> Vec<(i64, Instant)> {
    let ids: Vec<i64> = rows.iter().map(|(id, _)| *id).collect();
    // Without an answer, the next statement finds out.
    let locked = table.store.locked(&ids).await.unwrap_or_default();
    rows.retain(|(id, _)| !locked.contains(id));
    not_written.extend(locked.into_iter().map(|id| (id, NotWritten::HeldUp(reason.to_owned()))));
    rows
}

async fn set_locked_aside(
    table: &Table,
    rows: Vec<(i64, Instant)>,
    error: &StoreError,
    not_written: &mut HashMap<i64, NotWritten>,
) -> Vec<(i64, Instant)> {
    without_locked(table, rows, &error.to_string(), not_written).await
}

/// Pushes both halves, the first on top. A single row, of which others were taken away, stays whole.
fn push_halves(parts: &mut Vec<(Vec<(i64, Instant)>, u32)>, rows: &Rows) {
    let (first, second) = rows.split_at(rows.len() / 2);
    let halves = [second, first].into_iter().filter(|half| !half.is_empty());
    parts.extend(halves.map(|half| (half.to_vec(), 0)));
}

/// How long a statement may be held up.
#[derive(Clone, Copy)]
enum Record {
    Usually,
    Briefly,
}

impl Record {
    async fn record(self, table: &Table, rows: &Rows) -> Result<Recorded, StoreError> {
        // The age is taken anew for each attempt: it counts from now back to the answer.
        let sightings: Vec<Sighting> =
            rows.iter().map(|&(id, at)| Sighting { id, age: at.elapsed() }).collect();
        let recorded = match self {
            Self::Usually => table.store.record_seen(&sightings).await,
            Self::Briefly => table.store.record_seen_briefly(&sightings).await,
        };
        match &recorded {
            Ok(recorded) => table.announce(recorded),
            Err(error) if error.may_be_committed() => {
                table
                    .events
                    .leave_gap("a write may have been committed although its outcome was lost");
            }
            Err(_) => {}
        }
        recorded
    }
}
