//! Read-only access to the table.

use std::time::{Duration, SystemTime};

use crate::config::Backend;
use crate::{Config, StoreError, postgres, sqlite};

/// An object in the table: it was seen, and the routine has not deleted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// The object.
    pub id: i64,
    /// When the object was last seen, with the precision of the database.
    pub last_seen: SystemTime,
    /// Time since `last_seen` by the database's clock. If `last_seen` was in the future, it counts
    /// as now.
    pub age: Duration,
}

/// Reads the committed rows of the table, and never blocks a writer. It has one connection, so it
/// may be unusable after an error, and after a failover it may still lead to the former primary.
pub struct Objects(Kind);

enum Kind {
    Postgres(postgres::Reader),
    Sqlite(sqlite::Reader),
}

impl Objects {
    /// Connects to a server that has the wanted `target_session_attrs`, or opens the file. It
    /// creates nothing and does not migrate the schema.
    ///
    /// # Errors
    /// [`StoreError`]: `Connect`, `Unsuitable`, `Open`, `UnusableTable` or `Timeout`.
    pub async fn open(config: &Config) -> Result<Self, StoreError> {
        let kind = match config.backend() {
            Backend::Postgres(servers) => {
                Kind::Postgres(postgres::Reader::open(servers, &config.time_zone()).await?)
            }
            Backend::Sqlite(location) => Kind::Sqlite(sqlite::Reader::open(location.path()).await?),
        };
        Ok(Self(kind))
    }

    /// Returns up to `limit` objects in ascending order of their ids. They begin after the id
    /// `after`, or at the lowest id if `after` is `None`. Rows without a time, which another
    /// program's table may contain, are left out.
    ///
    /// # Errors
    /// [`StoreError`]: `List` or `Timeout`.
    pub async fn page(
        &mut self,
        after: Option<i64>,
        limit: u32,
    ) -> Result<Vec<Object>, StoreError> {
        let Some(first) = after.map_or(Some(i64::MIN), |after| after.checked_add(1)) else {
            return Ok(Vec::new());
        };
        match &mut self.0 {
            Kind::Postgres(reader) => reader.page(first, limit).await,
            Kind::Sqlite(reader) => reader.page(first, limit).await,
        }
    }

    /// The number of objects that all pages together contain.
    ///
    /// # Errors
    /// [`StoreError`]: `Count` or `Timeout`.
    pub async fn count(&mut self) -> Result<u64, StoreError> {
        match &mut self.0 {
            Kind::Postgres(reader) => reader.count().await,
            Kind::Sqlite(reader) => reader.count().await,
        }
    }
}

impl Object {
    /// Builds an object from microseconds since 1970.
    pub(crate) fn new(id: i64, last_seen_micros: i64, now_micros: i64) -> Self {
        let since_1970 = Duration::from_micros(last_seen_micros.unsigned_abs());
        let last_seen = if last_seen_micros < 0 {
            SystemTime::UNIX_EPOCH - since_1970
        } else {
            SystemTime::UNIX_EPOCH + since_1970
        };
        let age_micros = now_micros.saturating_sub(last_seen_micros);
        Self { id, last_seen, age: Duration::from_micros(age_micros.try_into().unwrap_or(0)) }
    }
}
