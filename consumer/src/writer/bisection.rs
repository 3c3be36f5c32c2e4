//! Splits a batch in halves to write all rows but those that cannot be written.
//!
//! Decision: docs/decisions/0036-how-are-database-errors-classified.md

use std::collections::HashMap;
use std::time::{Duration, Instant};

use store::{Failure, Recorded, Sighting, StoreError};

use super::Table;

/// After this many failures of a single row with an error that may concern the whole database, the
/// row itself is considered the cause.
const SINGLE_ROW_ATTEMPTS: u32 = 3;

/// Why a row is not committed.
pub(super) enum NotWritten {
    /// The database permanently refuses it.
    Refused(String),
    /// It cannot be written now.
    HeldUp(String),
}

/// Objects and the times of their sightings, in ascending order of the ids. Every process locks
/// rows in this order, so that there is no deadlock.
pub(super) type Rows = [(i64, Instant)];

/// Commits all rows of the batch but those that it returns. While the database is away, it retries:
/// the results wait, unacked, and the limit on unsettled lookups stops further lookups.
///
/// A part of the batch that fails is halved, and the halves are committed or halved again. So one
/// bad row among 1,000 costs about twenty statements. One statement finds the rows that are locked.
///
/// `may_set_aside` returns whether a row that fails with an error that may concern all rows can be
/// set aside. If not, the row is retried here.
pub(super) async fn write(
    table: &Table,
    batch: &Rows,
    may_set_aside: impl Fn() -> bool,
) -> HashMap<i64, NotWritten> {
    let mut waits = broker::backoff();
    let mut failures = 0_u32;
    let mut not_written = HashMap::new();
    let mut parts = vec![(batch.to_vec(), 0)];
    let mut lock_wait = LockWait::Usual;
    while let Some((rows, failed)) = parts.pop() {
        let Err(error) = lock_wait.record(table, &rows).await else {
            table.note_success();
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
                    "the database refused a row; its messages become dead letters"
                );
                not_written.insert(id, NotWritten::Refused(reason));
            }
            Failure::BusyRow => {
                lock_wait = LockWait::Brief;
                let reason = error.to_string();
                let free = without_locked(table, rows, &reason, &mut not_written).await;
                match free.as_slice() {
                    [] => {}
                    // The row is not locked, but held up by a trigger or a concurrent insert, for
                    // example.
                    &[(id, _)] if is_single => {
                        not_written.insert(id, NotWritten::HeldUp(reason));
                    }
                    _ => push_halves(&mut parts, &free),
                }
            }
            Failure::RefusedRow => push_halves(&mut parts, &rows),
            Failure::Connection | Failure::Database => {
                failures += 1;
                table.note_failure(&error, failures, rows.len());
                tokio::time::sleep(waits.next().unwrap_or(Duration::from_secs(1))).await;
                if failure == Failure::Connection {
                    parts.push((rows, failed));
                } else if !is_single {
                    push_halves(&mut parts, &rows);
                } else if failed + 1 >= SINGLE_ROW_ATTEMPTS && may_set_aside() {
                    not_written.insert(rows[0].0, NotWritten::HeldUp(error.to_string()));
                } else {
                    parts.push((rows, failed + 1));
                }
            }
        }
    }
    // Rows that could not be written are handled elsewhere from here on.
    table.note_success();
    if failures > 0 {
        tracing::info!(rows = batch.len(), failures, "wrote a batch that had failed before");
    }
    not_written
}

/// Tries to write rows that were set aside, once: the caller retries them later.
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

/// Removes and returns the rows that are not locked; adds the others to `not_written`.
pub(super) async fn without_locked(
    table: &Table,
    mut rows: Vec<(i64, Instant)>,
    reason: &str,
    not_written: &mut HashMap<i64, NotWritten>,
) -> Vec<(i64, Instant)> {
    let ids: Vec<i64> = rows.iter().map(|(id, _)| *id).collect();
    // If this fails, the next statement reports the locked rows.
    let locked = table.store.find_locked(&ids).await.unwrap_or_default();
    rows.retain(|(id, _)| !locked.contains(id));
    not_written.extend(locked.into_iter().map(|id| (id, NotWritten::HeldUp(reason.to_owned()))));
    rows
}

/// Pushes both halves, the first one on top. Of a single row, one half is empty and not pushed.
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
        // The age is computed for each attempt, because it is the time from the answer to now.
        let sightings: Vec<Sighting> =
            rows.iter().map(|&(id, at)| Sighting { id, age: at.elapsed() }).collect();
        let recorded = match self {
            Self::Usual => table.store.record_seen(&sightings).await,
            Self::Brief => table.store.record_seen_briefly(&sightings).await,
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
