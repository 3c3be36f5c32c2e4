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

/// The table `object`. A Postgres may be away at any time, also at the start; a file is open from
/// the start on, and belongs to this process.
pub struct Store(Kind);

enum Kind {
    Postgres(postgres::Table),
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
                Kind::Postgres(postgres::Table::start(*options, &zone, name, connections))
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
    /// [`StoreError`]; then none is written, or, after a timeout, perhaps all. With
    /// [`StoreError::Refused`], there is a row among them that will never be; other errors pass by.
    pub async fn record_seen(&self, sightings: &[Sighting]) -> Result<Recorded, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.record_seen(sightings).await,
            Kind::Sqlite(table) => table.record_seen(sightings).await,
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
    /// [`StoreError`]; then none is deleted, or, after a timeout, perhaps all.
    pub async fn delete_stale(&self, oldest: Moment, limit: u32) -> Result<Vec<Row>, StoreError> {
        match &self.0 {
            Kind::Postgres(table) => table.delete_stale(oldest, limit).await,
            Kind::Sqlite(table) => table.delete_stale(oldest, limit).await,
        }
    }
}
