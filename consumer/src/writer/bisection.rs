//! Writes a batch of rows. A batch that fails is split in half repeatedly, so that a bad row does
//! not block the others.
//!
//! Decision: docs/decisions/0036-how-are-database-errors-classified.md

use std::collections::HashMap;
use std::time::{Duration, Instant};

use store::{Failure, Recorded, Sighting, StoreError};

use super::Table;

/// Some errors may come from the row or from the whole database. When a row has failed alone this
/// many times with such an error, it is considered the cause.
const SINGLE_ROW_ATTEMPTS: u32 = 3;

/// Why a row is not committed.
pub(super) enum NotWritten {
    /// The database permanently refuses the row.
    Refused(String),
    /// The row cannot be written now.
    HeldUp(String),
}

/// Objects and the times of their sightings, in ascending order of the ids. Every process locks
/// rows in this order, so that there is no deadlock.
pub(super) type Rows = [(i64, Instant)];

/// Commits the rows of the batch, and returns the rows that it could not commit. While the database
/// cannot be reached, this function retries. Meanwhile the deliveries stay unacked, and the limit
/// on unsettled lookups stops further lookups.
///
/// A part of the batch that fails is halved, and the halves are committed or halved again, so one
/// bad row among 1,000 costs about twenty statements. Locked rows need no halving: one query finds
/// them all.
///
/// `may_set_aside` decides about a row that keeps failing with an error that may concern the whole
/// database: if it returns true, the row counts as held up; otherwise this function retries the
/// row.
pub(super) async fn write(
    table: &Table,
    batch: &Rows,
    may_set_aside: impl Fn() -> bool,
) -> HashMap<i64, NotWritten> {
    let mut waits = messaging::amqp::backoff();
    let mut failures = 0_u32;
    let mut not_written = HashMap::new();
    // Each part with the number of times that it has failed as a single row.
    let mut parts = vec![(batch.to_vec(), 0)];
    let mut lock_wait = LockWait::Usual;
    while let Some((rows, single_failures)) = parts.pop() {
        let Err(error) = lock_wait.record(table, &rows).await else {
            table.record_success();
            waits = messaging::amqp::backoff();
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
                    "the database refused a row; its messages become dead letters"
                );
                not_written.insert(id, NotWritten::Refused(reason));
            }
            Failure::BusyRow => {
                // Wait only briefly from now on, so that other locked rows delay the batch less.
                lock_wait = LockWait::Brief;
                let reason = error.to_string();
                let free = without_locked(table, rows, &reason, &mut not_written).await;
                match free.as_slice() {
                    [] => {}
                    // A trigger or a concurrent insert holds the row up, or `find_locked` failed.
                    &[(id, _)] if is_single => {
                        not_written.insert(id, NotWritten::HeldUp(reason));
                    }
                    _ => push_halves(&mut parts, &free),
                }
            }
            Failure::RefusedRow => push_halves(&mut parts, &rows),
            Failure::Connection | Failure::Database => {
                failures += 1;
                table.record_failure(&error, failures, rows.len());
                tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(1))).await;
                if failure == Failure::Connection {
                    parts.push((rows, single_failures));
                } else if !is_single {
                    push_halves(&mut parts, &rows);
                } else if single_failures + 1 >= SINGLE_ROW_ATTEMPTS && may_set_aside() {
                    not_written.insert(rows[0].0, NotWritten::HeldUp(error.to_string()));
                } else {
                    parts.push((rows, single_failures + 1));
                }
            }
        }
    }
    // The caller handles the rows that could not be written, so the writer is no longer failing.
    table.record_success();
    if failures > 0 {
        tracing::info!(rows = batch.len(), failures, "finished a batch that had failed before");
    }
    not_written
}

/// Tries once to write rows that were set aside. The caller retries those that fail.
pub(super) async fn write_set_aside(table: &Table, batch: &Rows) -> HashMap<i64, NotWritten> {
    let mut not_written = HashMap::new();
    let free =
        without_locked(table, batch.to_vec(), "locked by another session", &mut not_written).await;
    let mut parts = vec![free];
    while let Some(rows) = parts.pop().filter(|rows| !rows.is_empty()) {
        let lock_wait = if rows.len() == 1 { LockWait::Usual } else { LockWait::Brief };
        let Err(error) = lock_wait.record(table, &rows).await else { continue };
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

/// Moves the locked rows to `not_written`, and returns the others.
pub(super) async fn without_locked(
    table: &Table,
    mut rows: Vec<(i64, Instant)>,
    reason: &str,
    not_written: &mut HashMap<i64, NotWritten>,
) -> Vec<(i64, Instant)> {
    let ids: Vec<i64> = rows.iter().map(|(id, _)| *id).collect();
    // If this query fails, all rows count as free, and writing the locked ones fails later.
    let locked = table.store.find_locked(&ids).await.unwrap_or_default();
    rows.retain(|(id, _)| !locked.contains(id));
    not_written.extend(locked.into_iter().map(|id| (id, NotWritten::HeldUp(reason.to_owned()))));
    rows
}

/// Pushes both halves, the first one on top. A single row has only one half that is not empty.
fn push_halves(parts: &mut Vec<(Vec<(i64, Instant)>, u32)>, rows: &Rows) {
    let (first, second) = rows.split_at(rows.len() / 2);
    let halves = [second, first].into_iter().filter(|half| !half.is_empty());
    parts.extend(halves.map(|half| (half.to_vec(), 0)));
}

/// How long a statement may wait for locks.
#[derive(Clone, Copy)]
enum LockWait {
    Usual,
    Brief,
}

impl LockWait {
    async fn record(self, table: &Table, rows: &Rows) -> Result<Recorded, StoreError> {
        // Computed for each attempt, because the age is the time since the status API's answer.
        let sightings: Vec<Sighting> =
            rows.iter().map(|&(id, at)| Sighting { id, age: at.elapsed() }).collect();
        let recorded = match self {
            Self::Usual => table.store.record_seen(&sightings).await,
            Self::Brief => table.store.record_seen_briefly(&sightings).await,
        };
        match &recorded {
            Ok(recorded) => table.publish_events(recorded),
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
