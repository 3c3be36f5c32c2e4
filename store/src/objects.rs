//! The table, for people who want to see it.

use std::time::{Duration, SystemTime};

use crate::config::Backend;
use crate::{Config, StoreError, postgres, sqlite};

/// An object that was online, and has not become stale or not been cleaned up yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Object {
    /// The object.
    pub id: i64,
    /// When it was last seen, as precisely as the database keeps it.
    pub last_seen: SystemTime,
    /// How long ago that is by the database's clock. A time in the future counts as now.
    pub age: Duration,
}

/// What is committed in the table, beside those who write it: nothing is changed, and nobody waits.
/// It has one connection, so after an error it may be of no use any more.
pub struct Objects(Kind);

enum Kind {
    Postgres(postgres::Reader),
    Sqlite(sqlite::Reader),
}

impl Objects {
    /// Connects, or opens the file. Neither brings the schema up to date nor makes what is missing.
    ///
    /// # Errors
    /// [`StoreError`]: `Connect`, `Open`, `UnusableTable` or `Timeout`.
    pub async fn open(config: &Config) -> Result<Self, StoreError> {
        let kind = match config.backend() {
            Backend::Postgres(options) => {
                Kind::Postgres(postgres::Reader::open(*options, &config.time_zone()).await?)
            }
            Backend::Sqlite(location) => Kind::Sqlite(sqlite::Reader::open(&location).await?),
        };
        Ok(Self(kind))
    }

    /// Up to `limit` objects with ids above `after`, or from the lowest on, in ascending order. A row
    /// without a time, which another program's table may allow, is left out.
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

    /// How many objects all pages together have.
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
    /// From what both databases give: microseconds since 1970.
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
