//! The rows that are written to the table and returned from it.

use std::time::Duration;

use crate::Moment;

/// One "online" answer of the status API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The object's id.
    pub id: i64,
    /// The time since the answer.
    pub age: Duration,
}

/// A row as committed, or as it was before it was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The object's id.
    pub id: i64,
    /// When the object was last seen.
    pub last_seen: Moment,
}

/// The result of recording a batch of sightings. A sighting in neither list was older than its row,
/// and changed nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// New rows.
    pub inserted: Vec<Row>,
    /// Existing rows with a newer `last_seen`.
    pub updated: Vec<Row>,
}

/// How long a statement may wait for a lock, and how long it may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockWait {
    /// The usual time.
    Usual,
    /// A short time, for the many statements of the search for the row that holds up a batch.
    Brief,
}

/// Whether a statement also records in the history which objects came online or were gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RecordHistory {
    Yes,
    No,
}
