//! Write access to the table.

use std::time::Duration;

use tokio::sync::watch;

use crate::config::Backend;
use crate::{Config, Moment, StoreError, StoreStatus, postgres, sqlite};

/// One "online" answer of the status API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The object's id.
    pub id: i64,
    /// The time since the answer.
    pub age: Duration,
}

/// A row as committed, or as it was before its deletion.
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

/// How long a statement may wait for locks, and run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockWait {
    /// The usual time.
    Usual,
    /// A short time, for a search by many statements.
    Brief,
}

/// The table `object`. A Postgres server may be away at any time, also at the start. A file is open
/// from the start, and belongs to this process.
pub struct Store(Kind);

// Decision: docs/decisions/0058-why-are-the-two-backends-enums.md
enum Kind {
    Postgres(Box<postgres::Table>),
    Sqlite(sqlite::Table),
}

impl Store {
    /// Starts a store. With Postgres, it starts a monitor that migrates the schema whenever the
    /// server comes (back), and opens up to `connections` connections for statements.
    /// `pg_stat_activity` shows `name`.
    ///
    /// With a file, it opens or creates the file and checks it for damage, which blocks the thread
    /// for up to a second. Stores of clones of one [`Config`] share the file.
    ///
    /// # Errors
    /// [`StoreError::Open`], only with a file. The file is then unchanged.
    pub fn start(config: &Config, name: &str, connections: u32) -> Result<Self, StoreError> {
        let kind = match config.backend() {
            Backend::Postgres(options) => {
                let zone = config.time_zone();
                let table = postgres::Table::start(*options, &zone, name, connections);
                Kind::Postgres(Box::new(table))
            }
            Backend::Sqlite(location) => Kind::Sqlite(sqlite::Table::open(&location)?),
        };
        Ok(Self(kind))
    }

    /// The name of the database system in traces: `postgresql` or `sqlite`.
    #[must_use]
    pub fn system(&self) -> &'static str {
        match &self.0 {
            Kind::Postgres(_) => "postgresql",
            Kind::Sqlite(_) => "sqlite",
        }
    }

    /// Whether the database answers and has the schema; with a file, whether it can be written.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<StoreStatus> {
        match &self.0 {
            Kind::Postgres(table) => table.status(),
            Kind::Sqlite(table) => table.status(),
        }
    }

    /// Waits until the first table that the monitor finds is unusable, and returns the reason.
    /// Waiting would not help then, so a service ends. A table that becomes unusable later shows
    /// only in the status, because a service that has worked must not end.
    pub async fn rejected(&self) -> String {
        match &self.0 {
            Kind::Postgres(table) => table.rejected().await,
            Kind::Sqlite(_) => std::future::pending().await,
        }
    }

    /// Returns only if the file's writing thread or the monitor of Postgres has died. A service
    /// must not outlive it.
    pub async fn died(&self) {
        match &self.0 {
            Kind::Postgres(table) => table.died().await,
            Kind::Sqlite(table) => table.died().await,
        }
    }

    /// Records that each object was online `age` ago by the database's clock, commits, and returns
    /// the changed rows. A row never moves back. An age that reaches back before 1970 counts as
    /// 1970.
    ///
    /// The ids must be distinct and in ascending order: in Postgres, batches that overlap in
    /// different orders would deadlock.
    ///
    /// # Errors
    /// [`StoreError`]; then no sighting is written, or perhaps all if
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
        match &self.0 {
            Kind::Postgres(table) => table.record_seen(sightings, wait).await,
            Kind::Sqlite(table) => table.record_seen(sightings).await,
        }
    }

    /// The rows among `ids` that another transaction has locked now, so that a write would wait. It
    /// does not find rows that are not in the table yet, or that a trigger or a foreign key holds
    /// up.
    ///
    /// # Errors
    /// [`StoreError`]: `Locked` or `Timeout`.
    pub async fn find_locked(&self, ids: &[i64]) -> Result<Vec<i64>, StoreError> {
        match &self.0 {
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
        match &self.0 {
            Kind::Postgres(table) => table.now().await,
            Kind::Sqlite(table) => table.now().await,
        }
    }

    /// Sets up to `limit` rows that are dated more than a second in the future to the current time,
    /// and returns their number. Such rows exist after the clock was set back, or if another
    /// program wrote them; they would otherwise stay until that time.
    ///
    /// # Errors
    /// [`StoreError`]: `CorrectFuture` or `Timeout`; then no row is corrected, or, after a timeout,
    /// perhaps all.
    pub async fn correct_future(&self, limit: u32) -> Result<u64, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.correct_future(limit).await,
            Kind::Sqlite(table) => table.correct_future(limit).await,
        }
    }

    /// Deletes up to `limit` rows that were last seen before `oldest`, and returns them. Fewer than
    /// `limit` rows mean that no unlocked stale rows are left.
    ///
    /// It does not read the clock: if the clock is set after the caller has read it, no row becomes
    /// stale by that.
    ///
    /// It skips rows that another transaction has locked: a row that is being updated is no longer
    /// stale, and one that is being deleted needs no second delete. So it never waits for an
    /// upsert, and an upsert waits at most for one such batch.
    ///
    /// # Errors
    /// [`StoreError`]; then no row is deleted, or perhaps all if [`StoreError::may_be_committed`].
    pub async fn delete_stale(&self, oldest: Moment, limit: u32) -> Result<Vec<Row>, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.delete_stale(oldest, limit).await,
            Kind::Sqlite(table) => table.delete_stale(oldest, limit).await,
        }
    }

    /// The number of rows that were last seen before `oldest`, and the number of all rows.
    ///
    /// # Errors
    /// [`StoreError`]: `Count` or `Timeout`.
    pub async fn count_stale(&self, oldest: Moment) -> Result<(u64, u64), StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.count_stale(oldest).await,
            Kind::Sqlite(table) => table.count_stale(oldest).await,
        }
    }

    /// Up to `limit` ids of rows that were last seen before `oldest`, except those in `except`.
    /// They are for [`Store::delete_stale_among`], if [`Store::delete_stale`] fails because of
    /// single rows. A file has no such rows, because no other program locks them or adds triggers
    /// and foreign keys.
    ///
    /// # Errors
    /// [`StoreError`]: `List` or `Timeout`.
    pub async fn list_stale(
        &self,
        oldest: Moment,
        limit: u32,
        except: &[i64],
    ) -> Result<Vec<i64>, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.list_stale(oldest, limit, except).await,
            Kind::Sqlite(_) => Ok(Vec::new()),
        }
    }

    /// Like [`Store::delete_stale`], but deletes only stale rows among `ids`, and waits as briefly
    /// as [`Store::record_seen_briefly`].
    ///
    /// # Errors
    /// As [`Store::delete_stale`].
    pub async fn delete_stale_among(
        &self,
        oldest: Moment,
        ids: &[i64],
    ) -> Result<Vec<Row>, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.delete_stale_among(oldest, ids).await,
            Kind::Sqlite(_) => Ok(Vec::new()),
        }
    }
}
