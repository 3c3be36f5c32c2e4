//! The table in a SQLite file.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use runtime::{Status, Supervisor};
use rusqlite::Connection;
use sqlite_file::{File, Format, OpenError};
use tokio::sync::watch;
use tokio::task::spawn_blocking;

use crate::deadline::{CONNECT_TIMEOUT, QUERY_TIMEOUT, within};
use crate::error::Cause;
use crate::history::{self, Presence};
use crate::rows::RecordHistory;
use crate::{Cutoff, Moment, Object, Recorded, Row, Sighting, StoreError};

// Decision: docs/decisions/0041-why-is-there-no-index-on-last-seen.md
/// As in Postgres, there is no index on `last_seen`, because each upsert would also have to write
/// the index.
pub(crate) const FORMAT: Format = Format {
    name: "store",
    application_id: u32::from_be_bytes(*b"LSSt"),
    version: 1,
    schema: "
        CREATE TABLE object (
            id INTEGER PRIMARY KEY,
            last_seen INTEGER NOT NULL -- milliseconds since 1970, UTC
        ) STRICT;",
    additions: history::SCHEMA,
    ballast_bytes: 0,
    max_bytes: u64::MAX,
    // The history is not salvaged: if rows came back one by one, or not at all, readers of the feed
    // would miss them. Their cursors are refused instead.
    tables: &[sqlite_file::Table { from: "object", into: "object", columns: "id, last_seen" }],
};

/// How many old changes of the history one transaction deletes.
const HISTORY_BATCH: u32 = 10_000;

/// A row that is dated less than this in the future is not corrected, because its date will soon be
/// in the past.
const FUTURE_TOLERANCE_MS: i64 = 1_000;

/// The table, which only this process writes.
#[derive(Clone)]
pub(crate) struct Table(Arc<File>);

impl Table {
    pub(crate) fn open(path: &Path, supervisor: &Supervisor) -> Result<Self, OpenError> {
        File::open(path, FORMAT, supervisor).map(|file| Self(Arc::new(file)))
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.0.status()
    }

    pub(crate) fn kept(&self) -> watch::Receiver<Status> {
        self.0.kept()
    }

    /// Closes the file, unless another role of this process has it open.
    pub(crate) async fn close(self) {
        if let Some(file) = Arc::into_inner(self.0) {
            file.close().await;
        }
    }

    pub(crate) async fn record_seen(
        &self,
        sightings: &[Sighting],
        history: RecordHistory,
    ) -> Result<Recorded, StoreError> {
        let started_at = Instant::now();
        let sightings = sightings.to_vec();
        let record = self.0.transact(move |connection| {
            let now = now_ms(connection)?;
            // The ages have grown while this batch waited for the writing thread.
            let waited = started_at.elapsed();
            // Two statements, because an upsert does not return whether it inserted a row. The
            // update comes first, because most rows exist already.
            let mut update = connection.prepare_cached(
                // A row that is dated in the future is wrong, so an older sighting replaces it.
                "UPDATE object SET last_seen = ?2 WHERE id = ?1 AND (last_seen < ?2 OR last_seen > ?3)",
            )?;
            let mut insert = connection.prepare_cached(
                "INSERT INTO object (id, last_seen) VALUES (?1, ?2) ON CONFLICT (id) DO NOTHING",
            )?;
            let mut history = history::Writer::new(connection, history)?;
            let mut recorded = Recorded::default();
            for Sighting { id, age } in sightings {
                let ms = ago_ms(now, age.saturating_add(waited));
                let row = Row { id, last_seen: Moment::from_millis(ms) };
                // A file rejects no row: any two integers are valid, and no other program adds
                // constraints.
                if update.execute((id, ms, now))? > 0 {
                    recorded.updated.push(row);
                } else if insert.execute((id, ms))? > 0 {
                    history.record(id, now, ms, Presence::Online)?;
                    recorded.inserted.push(row);
                }
            }
            Ok(recorded)
        });
        within(QUERY_TIMEOUT, StoreError::RecordSeen, record).await
    }

    pub(crate) async fn now(&self) -> Result<Moment, StoreError> {
        let read = self.0.transact(now_ms);
        let now_ms = within(QUERY_TIMEOUT, StoreError::Clock, read).await?;
        Ok(Moment::from_millis(now_ms))
    }

    pub(crate) async fn correct_future(&self, limit: u32) -> Result<u64, StoreError> {
        let correct = self.0.transact(move |connection| {
            let now = now_ms(connection)?;
            let mut update = connection.prepare_cached(
                "UPDATE object SET last_seen = ?1 WHERE id IN (
                     SELECT id FROM object WHERE last_seen > ?2 LIMIT ?3)",
            )?;
            let corrected =
                update.execute((now, now.saturating_add(FUTURE_TOLERANCE_MS), limit))?;
            Ok(corrected as u64)
        });
        within(QUERY_TIMEOUT, StoreError::CorrectFuture, correct).await
    }

    pub(crate) async fn count_stale(&self, cutoff: Cutoff) -> Result<(u64, u64), StoreError> {
        let count = self.0.transact(move |connection| {
            let mut count = connection.prepare_cached(
                "SELECT count(*) FILTER (WHERE last_seen < ?1), count(*) FROM object",
            )?;
            count.query_row([oldest_ms(cutoff, connection)?], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))
            })
        });
        let (stale, all) = within(QUERY_TIMEOUT, StoreError::Count, count).await?;
        Ok((stale.unsigned_abs(), all.unsigned_abs()))
    }

    pub(crate) async fn delete_stale(
        &self,
        cutoff: Cutoff,
        limit: u32,
        history: RecordHistory,
    ) -> Result<Vec<Row>, StoreError> {
        let delete = self.0.transact(move |connection| {
            let mut delete = connection.prepare_cached(
                "DELETE FROM object WHERE id IN (
                     SELECT id FROM object WHERE last_seen < ?1 LIMIT ?2)
                 RETURNING id, last_seen",
            )?;
            let mut history = history::Writer::new(connection, history)?;
            let now = now_ms(connection)?;
            let mut deleted = delete.query((oldest_ms(cutoff, connection)?, limit))?;
            let mut rows = Vec::new();
            while let Some(row) = deleted.next()? {
                let (id, ms) = (row.get(0)?, row.get(1)?);
                history.record(id, now, ms, Presence::Gone)?;
                rows.push(Row { id, last_seen: Moment::from_millis(ms) });
            }
            Ok(rows)
        });
        within(QUERY_TIMEOUT, StoreError::DeleteStale, delete).await
    }

    /// Deletes old changes of the history, and returns whether there may be more.
    pub(crate) async fn maintain_history(&self, retention: Duration) -> Result<bool, StoreError> {
        let delete = self
            .0
            .transact(move |connection| history::delete_old(connection, retention, HISTORY_BATCH));
        let deleted = within(QUERY_TIMEOUT, StoreError::History, delete).await?;
        Ok(deleted > 0)
    }
}

/// Reads the table on its own connection. With a write-ahead log, it never waits for a write.
pub(crate) struct Reader(Arc<Mutex<Connection>>);

impl Reader {
    pub(crate) async fn open(path: &Path) -> Result<Self, StoreError> {
        let path = path.to_owned();
        let open = spawn_blocking(move || sqlite_file::attach(&path, FORMAT));
        let connection = within(CONNECT_TIMEOUT, StoreError::Connect, open).await??;
        Ok(Self(Arc::new(Mutex::new(connection))))
    }

    pub(crate) async fn page(&self, first: i64, limit: u32) -> Result<Vec<Object>, StoreError> {
        self.read(StoreError::List, move |connection| {
            let now = now_ms(connection)?;
            let mut page = connection.prepare_cached(
                "SELECT id, last_seen FROM object WHERE id >= ?1 ORDER BY id LIMIT ?2",
            )?;
            let objects = page.query_map((first, limit), |row| {
                Ok(Object::new(row.get(0)?, micros(row.get::<_, i64>(1)?.min(now)), micros(now)))
            })?;
            objects.collect()
        })
        .await
    }

    pub(crate) async fn count(&self) -> Result<u64, StoreError> {
        let count = "SELECT count(*) FROM object";
        let rows: i64 = self
            .read(StoreError::Count, |connection| connection.query_row(count, [], |row| row.get(0)))
            .await?;
        Ok(rows.unsigned_abs())
    }

    async fn read<T: Send + 'static>(
        &self,
        to_error: fn(Cause) -> StoreError,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let connection = Arc::clone(&self.0);
        let read = spawn_blocking(move || query(&connection.lock()));
        within(QUERY_TIMEOUT, to_error, read).await?.map_err(|error| to_error(error.into()))
    }
}

/// The database's clock, read once for each batch, in milliseconds since 1970.
pub(crate) fn now_ms(connection: &Connection) -> rusqlite::Result<i64> {
    // SQLite returns seconds as a float, so the product may be slightly less than a whole number.
    let now = "SELECT CAST(round(unixepoch('subsec') * 1000) AS INTEGER)";
    connection.prepare_cached(now)?.query_row([], |row| row.get(0))
}

/// Rows last seen before this time are stale, in milliseconds since 1970.
fn oldest_ms(Cutoff { oldest, age }: Cutoff, connection: &Connection) -> rusqlite::Result<i64> {
    let ms = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
    Ok(ms(oldest.since_1970).min(now_ms(connection)?.saturating_sub(ms(age))))
}

fn micros(ms: i64) -> i64 {
    ms.saturating_mul(1_000)
}

/// The time `age` ago, but not before 1970.
pub(crate) fn ago_ms(now_ms: i64, age: Duration) -> i64 {
    let age_ms = i64::try_from(age.as_millis()).unwrap_or(i64::MAX);
    now_ms.saturating_sub(age_ms).max(0)
}
