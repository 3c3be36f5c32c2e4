//! The table, for those who write it.

use std::time::Duration;

use tokio::sync::watch;

use crate::config::Backend;
use crate::{Config, Moment, StoreError, StoreStatus, postgres, sqlite};

/// An object that was online.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The object.
    pub id: i64,
    /// How long ago the status API said so.
    pub age: Duration,
}

/// A row as it was committed, or as it was before it was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The object.
    pub id: i64,
    /// When it was last seen.
    pub last_seen: Moment,
}

/// What has become of a batch of sightings. Those that are in neither list were older than their rows,
/// and have changed nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Rows that were not there before.
    pub inserted: Vec<Row>,
    /// Rows that were there, and were moved forward.
    pub updated: Vec<Row>,
}

/// How long a statement may wait for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waits {
    /// As the session is set.
    Usual,
    /// So that many statements take no longer than one usually may.
    Brief,
}

/// The table `object`. A Postgres may be away at any time, also at the start; a file is open from
/// the start on, and belongs to this process.
pub struct Store(Kind);

// Decision: docs/decisions/0058-why-are-the-two-backends-enums.md
enum Kind {
    Postgres(Box<postgres::Table>),
    Sqlite(sqlite::Table),
}

impl Store {
    /// Starts to look after a Postgres in the background: connects up to `connections` times when it
    /// can be reached, brings the schema up to date, and does so again whenever it has been away.
    /// `name` is what `pg_stat_activity` shows.
    ///
    /// Or opens the file, makes it first if it is not there, and looks for damage for up to a second
    /// before it returns, which blocks the thread meanwhile. Stores of clones of one [`Config`] share
    /// one file.
    ///
    /// # Errors
    /// [`StoreError::Open`], of a file only. The file is then as it was.
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

    /// What traces call the database: `postgresql` or `sqlite`.
    #[must_use]
    pub fn system(&self) -> &'static str {
        match &self.0 {
            Kind::Postgres(_) => "postgresql",
            Kind::Sqlite(_) => "sqlite",
        }
    }

    /// Whether the database answers and has our schema; of a file, whether it can be written.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<StoreStatus> {
        match &self.0 {
            Kind::Postgres(table) => table.status(),
            Kind::Sqlite(table) => table.status(),
        }
    }

    /// Returns the reason if the table that was found first cannot be used, which no waiting changes. One
    /// that becomes so later shows in the status only: a service that has worked does not end for it.
    pub async fn rejected(&self) -> String {
        match &self.0 {
            Kind::Postgres(table) => table.rejected().await,
            Kind::Sqlite(_) => std::future::pending().await,
        }
    }

    /// Returns only if what writes has died, or what looks after a Postgres; a service must not outlive
    /// it.
    pub async fn died(&self) {
        match &self.0 {
            Kind::Postgres(table) => table.died().await,
            Kind::Sqlite(table) => table.died().await,
        }
    }

    /// Notes that each object was online `age` ago by the database's clock, and never moves a row
    /// back. Says what it has changed. The ids must be distinct and in ascending order: batches that overlap in different
    /// orders would deadlock in Postgres. All are committed on return. An age that reaches back
    /// before 1970 counts as 1970.
    ///
    /// # Errors
    /// [`StoreError`]; then none is written, or perhaps all if [`StoreError::may_be_committed`]. What
    /// to do about it is said by [`StoreError::failure`].
    pub async fn record_seen(&self, sightings: &[Sighting]) -> Result<Recorded, StoreError> {
        self.record(sightings, Waits::Usual).await
    }

    /// The same, but in a Postgres it waits 200 ms for a lock and 1 s for the whole, to find the row
    /// of a batch that holds it up.
    ///
    /// # Errors
    /// As [`Store::record_seen`].
    pub async fn record_seen_briefly(
        &self,
        sightings: &[Sighting],
    ) -> Result<Recorded, StoreError> {
        self.record(sightings, Waits::Brief).await
    }

    async fn record(&self, sightings: &[Sighting], waits: Waits) -> Result<Recorded, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.record_seen(sightings, waits).await,
            Kind::Sqlite(table) => table.record_seen(sightings).await,
        }
    }

    /// Which of these rows another transaction has locked at this moment, so that a write would wait.
    /// A row that is not in the table yet, or that a trigger or a foreign key holds up, is not found
    /// by this.
    ///
    /// # Errors
    /// [`StoreError`]: `Locked` or `Timeout`.
    pub async fn locked(&self, ids: &[i64]) -> Result<Vec<i64>, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.locked(ids).await,
            // The only writer of a file is this process, one batch at a time.
            Kind::Sqlite(_) => Ok(Vec::new()),
        }
    }

    /// What the database's clock says.
    ///
    /// # Errors
    /// [`StoreError`]: `Clock` or `Timeout`.
    pub async fn now(&self) -> Result<Moment, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.now().await,
            Kind::Sqlite(table) => table.now().await,
        }
    }

    /// Dates up to `limit` rows that are dated in the future, more than a second from now, as now, and
    /// says how many: the clock was set back, or another program wrote them. Otherwise they would stay
    /// until then.
    ///
    /// # Errors
    /// [`StoreError`]: `CorrectFuture` or `Timeout`; then none is corrected, or, after a timeout, perhaps
    /// all.
    pub async fn correct_future(&self, limit: u32) -> Result<u64, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.correct_future(limit).await,
            Kind::Sqlite(table) => table.correct_future(limit).await,
        }
    }

    /// Deletes up to `limit` rows that were last seen before `oldest`, and says which; fewer than
    /// `limit` means that no more are left that nobody else is busy with. Nothing was seen before 1970.
    ///
    /// It does not look at the clock itself: a clock that is set after its caller has looked at it
    /// makes nothing stale.
    ///
    /// A row that is being written at this moment is left out: it is not stale any more, or another
    /// replica deletes it. So this never waits for an upsert, and an upsert waits at most for the
    /// end of one such batch.
    ///
    /// # Errors
    /// [`StoreError`]; then none is deleted, or perhaps all if [`StoreError::may_be_committed`].
    pub async fn delete_stale(&self, oldest: Moment, limit: u32) -> Result<Vec<Row>, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.delete_stale(oldest, limit).await,
            Kind::Sqlite(table) => table.delete_stale(oldest, limit).await,
        }
    }

    /// How many rows were last seen before `oldest`, and how many there are.
    ///
    /// # Errors
    /// [`StoreError`]: `Count` or `Timeout`.
    pub async fn count_stale(&self, oldest: Moment) -> Result<(u64, u64), StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.count_stale(oldest).await,
            Kind::Sqlite(table) => table.count_stale(oldest).await,
        }
    }

    /// Up to `limit` ids of rows that were last seen before `oldest`, without those in `except`; for
    /// [`Store::delete_these`], when [`Store::delete_stale`] fails because of single rows. A file has
    /// no such rows: nobody else locks them or adds triggers and foreign keys.
    ///
    /// # Errors
    /// [`StoreError`]: `List` or `Timeout`.
    pub async fn stale(
        &self,
        oldest: Moment,
        limit: u32,
        except: &[i64],
    ) -> Result<Vec<i64>, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.stale(oldest, limit, except).await,
            Kind::Sqlite(_) => Ok(Vec::new()),
        }
    }

    /// Deletes those of the rows `ids` that were last seen before `oldest`, as [`Store::delete_stale`]
    /// does, and waits as briefly as [`Store::record_seen_briefly`].
    ///
    /// # Errors
    /// As [`Store::delete_stale`].
    pub async fn delete_these(&self, oldest: Moment, ids: &[i64]) -> Result<Vec<Row>, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.delete_these(oldest, ids).await,
            Kind::Sqlite(_) => Ok(Vec::new()),
        }
    }
}
