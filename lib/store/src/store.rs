//! Write access to the table.

use runtime::{Reloadable, Status};
use tokio::sync::watch;

use crate::database::{Backend, Database};
use crate::rows::{LockWait, RecordHistory};
use crate::{Cutoff, Moment, Recorded, Retention, Row, Sighting, StoreError, postgres, sqlite};

/// The table `object`. A Postgres server may be away at any time, also at the start. A file is open
/// from the start and belongs to this process.
pub struct Store {
    kind: Kind,
    retention: Reloadable<Retention>,
}

// Decision: docs/decisions/0058-why-are-the-two-backends-enums.md
enum Kind {
    Postgres(Box<postgres::Table>),
    Sqlite(sqlite::Table),
}

impl Store {
    /// Starts a store. With Postgres, it starts a monitor that finds the server that accepts writes
    /// and migrates the schema whenever such a server comes (back), and opens up to `connections`
    /// connections to it for statements. `pg_stat_activity` shows `name`.
    #[must_use]
    pub fn start(database: Database, name: &str, connections: u32) -> Self {
        let Database { backend, supervisor, retention } = database;
        let kind = match backend {
            Backend::Postgres(servers, zone) => {
                let table = postgres::Table::start(servers, &zone, name, connections, &supervisor);
                Kind::Postgres(Box::new(table))
            }
            Backend::Sqlite(table) => Kind::Sqlite(table),
        };
        Self { kind, retention }
    }

    /// The name of the database system in traces: `postgresql` or `sqlite`.
    #[must_use]
    pub fn system(&self) -> &'static str {
        match &self.kind {
            Kind::Postgres(_) => "postgresql",
            Kind::Sqlite(_) => "sqlite",
        }
    }

    /// Whether the database answers and has the schema; for a file, whether it can be written.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        match &self.kind {
            Kind::Postgres(table) => table.status(),
            Kind::Sqlite(table) => table.status(),
        }
    }

    /// Whether the history can be written; `None` if there is no history, or if it is in a file.
    /// While it cannot be written, objects are recorded and deleted without it.
    #[must_use]
    pub fn history_status(&self) -> Option<watch::Receiver<Status>> {
        match &self.kind {
            Kind::Postgres(table) if self.retention.current().is_on() => Some(table.history()),
            Kind::Postgres(_) | Kind::Sqlite(_) => None,
        }
    }

    async fn history(&self) -> RecordHistory {
        match &self.kind {
            _ if !self.retention.current().is_on() => RecordHistory::No,
            Kind::Postgres(table) => table.records_history().await,
            Kind::Sqlite(_) => RecordHistory::Yes,
        }
    }

    /// Does a part of the maintenance of the history: prepares it for the next days, and deletes
    /// changes that are older than `HISTORY_RETENTION`. Returns whether there may be more to do. Does
    /// nothing without a history.
    ///
    /// # Errors
    /// [`StoreError`]: `History`, or why there is no connection.
    pub async fn maintain_history(&self) -> Result<bool, StoreError> {
        let Retention { history_retention } = self.retention.current();
        if history_retention.is_zero() {
            return Ok(false);
        }
        match &self.kind {
            Kind::Postgres(table) => table.maintain_history(history_retention).await,
            Kind::Sqlite(table) => table.maintain_history(history_retention).await,
        }
    }

    /// Waits until the monitor reports that the table was unusable at the first successful
    /// connection, and returns the reason. A service then ends, because waiting would not help. If
    /// the table becomes unusable later, only the status shows that, because a service that has
    /// worked must not end.
    pub async fn rejected(&self) -> String {
        match &self.kind {
            Kind::Postgres(table) => table.rejected().await,
            Kind::Sqlite(_) => std::future::pending().await,
        }
    }

    /// Records the sightings, commits, and returns the changed rows. `last_seen` never moves back,
    /// unless it was in the future. An age that reaches back before 1970 counts as 1970.
    ///
    /// The ids must be distinct and in ascending order: in Postgres, batches that overlap in
    /// different orders would deadlock.
    ///
    /// # Errors
    /// [`StoreError`]. Then no sighting is written, or perhaps all are written if
    /// [`StoreError::may_be_committed`]. [`StoreError::failure`] says what to do.
    pub async fn record_seen(&self, sightings: &[Sighting]) -> Result<Recorded, StoreError> {
        self.record(sightings, LockWait::Usual).await
    }

    /// Like [`Store::record_seen`], but in Postgres it waits at most 200 ms for a lock and 1 s in
    /// total. The caller uses it to find the row that holds up a batch.
    ///
    /// # Errors
    /// As [`Store::record_seen`].
    pub async fn record_seen_briefly(
        &self,
        sightings: &[Sighting],
    ) -> Result<Recorded, StoreError> {
        self.record(sightings, LockWait::Brief).await
    }

    async fn record(&self, sightings: &[Sighting], wait: LockWait) -> Result<Recorded, StoreError> {
        match &self.kind {
            Kind::Postgres(table) => table.record_seen(sightings, wait, self.history()).await,
            Kind::Sqlite(table) => table.record_seen(sightings, self.history().await).await,
        }
    }

    /// Returns those of the `ids` whose rows another transaction has locked now, so that a write
    /// would wait. It does not find rows that are not in the table yet, or rows that a trigger or a
    /// foreign key holds up.
    ///
    /// # Errors
    /// [`StoreError`]: `Locked` or `Timeout`.
    pub async fn find_locked(&self, ids: &[i64]) -> Result<Vec<i64>, StoreError> {
        match &self.kind {
            Kind::Postgres(table) => table.find_locked(ids).await,
            // Only this process writes the file, one batch at a time.
            Kind::Sqlite(_) => Ok(Vec::new()),
        }
    }

    /// Reads the database's clock.
    ///
    /// # Errors
    /// [`StoreError`]: `Clock` or `Timeout`.
    pub async fn now(&self) -> Result<Moment, StoreError> {
        match &self.kind {
            Kind::Postgres(table) => table.now().await,
            Kind::Sqlite(table) => table.now().await,
        }
    }

    /// Sets up to `limit` rows that are dated more than a second in the future to the current time,
    /// and returns their number. Such rows exist after the clock was set back, or if another
    /// program wrote them. Without the correction, they would count as seen until that time.
    ///
    /// # Errors
    /// [`StoreError`]: `CorrectFuture` or `Timeout`. Then no row is corrected; after a timeout,
    /// perhaps all are.
    pub async fn correct_future(&self, limit: u32) -> Result<u64, StoreError> {
        match &self.kind {
            Kind::Postgres(table) => table.correct_future(limit).await,
            Kind::Sqlite(table) => table.correct_future(limit).await,
        }
    }

    /// Deletes up to `limit` stale rows, and returns them. Fewer than `limit` rows mean that no
    /// unlocked stale rows are left. [`Cutoff`] says what happens if the clock is set meanwhile.
    ///
    /// It skips rows that another transaction has locked: a row that is being updated is no longer
    /// stale, and a row that is being deleted needs no second delete. So it never waits for an
    /// upsert, and an upsert waits for at most one such batch.
    ///
    /// # Errors
    /// [`StoreError`]. Then no row is deleted, or perhaps all are deleted if
    /// [`StoreError::may_be_committed`].
    pub async fn delete_stale(&self, cutoff: Cutoff, limit: u32) -> Result<Vec<Row>, StoreError> {
        match &self.kind {
            Kind::Postgres(table) => table.delete_stale(cutoff, limit, self.history().await).await,
            Kind::Sqlite(table) => table.delete_stale(cutoff, limit, self.history().await).await,
        }
    }

    /// The number of stale rows, and the number of all rows.
    ///
    /// # Errors
    /// [`StoreError`]: `Count` or `Timeout`.
    pub async fn count_stale(&self, cutoff: Cutoff) -> Result<(u64, u64), StoreError> {
        match &self.kind {
            Kind::Postgres(table) => table.count_stale(cutoff).await,
            Kind::Sqlite(table) => table.count_stale(cutoff).await,
        }
    }

    /// Returns the ids of up to `limit` stale rows, except those in `except`. They are for
    /// [`Store::delete_stale_among`], if single rows make [`Store::delete_stale`] fail. A file has
    /// no such rows, because no other program locks its rows or adds triggers and foreign keys.
    ///
    /// # Errors
    /// [`StoreError`]: `List` or `Timeout`.
    pub async fn list_stale(
        &self,
        cutoff: Cutoff,
        limit: u32,
        except: &[i64],
    ) -> Result<Vec<i64>, StoreError> {
        match &self.kind {
            Kind::Postgres(table) => table.list_stale(cutoff, limit, except).await,
            Kind::Sqlite(_) => Ok(Vec::new()),
        }
    }

    /// Like [`Store::delete_stale`], but deletes only stale rows among `ids`, and waits for a lock
    /// as briefly as [`Store::record_seen_briefly`].
    ///
    /// # Errors
    /// As [`Store::delete_stale`].
    pub async fn delete_stale_among(
        &self,
        cutoff: Cutoff,
        ids: &[i64],
    ) -> Result<Vec<Row>, StoreError> {
        match &self.kind {
            Kind::Postgres(table) => {
                table.delete_stale_among(cutoff, ids, self.history().await).await
            }
            Kind::Sqlite(_) => Ok(Vec::new()),
        }
    }
}
