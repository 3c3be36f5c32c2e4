//! The history in a file. Only one process writes it, in one transaction at a time, so all changes
//! up to the newest visible one are settled.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rusqlite::{CachedStatement, Connection, Params};
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

use super::{Change, Presence, READERS, Until};
use crate::deadline::{QUERY_TIMEOUT, within};
use crate::rows::RecordHistory;
use crate::sqlite::{FORMAT, ago_ms, now_ms};
use crate::{Moment, StoreError};

/// As in Postgres, but the times are in milliseconds since 1970. An existing file gets the table when
/// it is opened.
pub(crate) const SCHEMA: &str = "
    CREATE TABLE IF NOT EXISTS presence_change (
        position INTEGER PRIMARY KEY AUTOINCREMENT,
        object_id INTEGER NOT NULL,
        at INTEGER NOT NULL, -- milliseconds since 1970, UTC
        last_seen INTEGER NOT NULL,
        is_online INTEGER NOT NULL CHECK (is_online IN (0, 1))
    ) STRICT;
    CREATE INDEX IF NOT EXISTS presence_change_object ON presence_change (object_id, position);
    INSERT INTO sqlite_sequence (name, seq)
    SELECT 'presence_change', CAST(unixepoch('subsec') * 1000000 AS INTEGER)
    WHERE NOT EXISTS (SELECT 1 FROM sqlite_sequence WHERE name = 'presence_change');";

/// Records changes in the transaction that makes them.
pub(crate) struct Writer<'a>(Option<CachedStatement<'a>>);

impl<'a> Writer<'a> {
    pub(crate) fn new(
        connection: &'a Connection,
        history: RecordHistory,
    ) -> rusqlite::Result<Self> {
        if history == RecordHistory::No {
            return Ok(Self(None));
        }
        let insert = "INSERT INTO presence_change (object_id, at, last_seen, is_online)
                      VALUES (?1, ?2, ?3, ?4)";
        connection.prepare_cached(insert).map(|insert| Self(Some(insert)))
    }

    pub(crate) fn record(
        &mut self,
        id: i64,
        now_ms: i64,
        last_seen_ms: i64,
        presence: Presence,
    ) -> rusqlite::Result<()> {
        let Some(insert) = &mut self.0 else { return Ok(()) };
        insert.execute((id, now_ms, last_seen_ms, presence == Presence::Online)).map(drop)
    }
}

/// Deletes the oldest changes, at most `limit`, if they are older than `retention`. The latest change
/// stays, so that its position is known. Returns the number of deleted changes.
pub(crate) fn delete_old(
    connection: &Connection,
    retention: Duration,
    limit: u32,
) -> rusqlite::Result<usize> {
    let oldest = ago_ms(now_ms(connection)?, retention);
    let mut delete = connection.prepare_cached(
        "DELETE FROM presence_change WHERE position IN (
             SELECT position FROM (
                 SELECT position, at FROM presence_change
                 WHERE position < (SELECT max(position) FROM presence_change)
                 ORDER BY position LIMIT ?2)
             WHERE at < ?1)",
    )?;
    delete.execute((oldest, limit))
}

pub(super) struct Reader {
    path: PathBuf,
    permits: Arc<Semaphore>,
}

impl Reader {
    pub(super) fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), permits: Arc::new(Semaphore::new(READERS)) }
    }

    pub(super) async fn changes_after(
        &self,
        position: i64,
        limit: u32,
    ) -> Result<Vec<Change>, StoreError> {
        self.changes("WHERE position > ?1 ORDER BY position LIMIT ?2", (position, limit)).await
    }

    pub(super) async fn extent(&self) -> Result<Vec<Change>, StoreError> {
        let ends = "WHERE position IN ((SELECT min(position) FROM presence_change),
                                       (SELECT max(position) FROM presence_change))
                    ORDER BY position";
        self.changes(ends, ()).await
    }

    pub(super) async fn changes_of(
        &self,
        id: i64,
        until: Until,
        limit: u32,
    ) -> Result<Vec<Change>, StoreError> {
        match until {
            Until::Now => {
                let newest = "WHERE object_id = ?1 ORDER BY position DESC LIMIT ?2";
                self.changes(newest, (id, limit)).await
            }
            Until::Position(position) => {
                let before = "WHERE object_id = ?1 AND position <= ?2
                              ORDER BY position DESC LIMIT ?3";
                self.changes(before, (id, position, limit)).await
            }
            Until::Time(time) => {
                let before = "WHERE object_id = ?1 AND position <= coalesce(
                                  (SELECT min(position) FROM presence_change
                                   WHERE object_id = ?1 AND at >= ?2), 9223372036854775807)
                              ORDER BY position DESC LIMIT ?3";
                self.changes(before, (id, millis(time), limit)).await
            }
        }
    }

    pub(super) async fn gone_since(
        &self,
        since: Moment,
        first_id: i64,
        limit: u32,
    ) -> Result<Vec<Change>, StoreError> {
        let gone = "AS latest
             WHERE NOT is_online AND at >= ?1 AND object_id >= ?2
               AND NOT EXISTS (SELECT 1 FROM presence_change AS later
                               WHERE later.object_id = latest.object_id
                                 AND later.position > latest.position)
               AND NOT EXISTS (SELECT 1 FROM object WHERE object.id = object_id)
             ORDER BY object_id LIMIT ?3";
        self.changes(gone, (millis(since), first_id, limit)).await
    }

    pub(super) async fn now(&self) -> Result<Moment, StoreError> {
        let now = self.read(now_ms).await?;
        Ok(Moment::from_millis(now))
    }

    /// The changes that `rest`, the rest of a statement, selects.
    async fn changes(
        &self,
        rest: &str,
        parameters: impl Params + Send + 'static,
    ) -> Result<Vec<Change>, StoreError> {
        let statement = format!(
            "SELECT position, object_id, is_online, at, last_seen FROM presence_change {rest}"
        );
        self.read(move |connection| {
            let mut select = connection.prepare_cached(&statement)?;
            let changes = select.query_map(parameters, |row| {
                let moment = |index| row.get(index).map(Moment::from_millis);
                Ok(Change::new(row.get(0)?, row.get(1)?, row.get(2)?, moment(3)?, moment(4)?))
            })?;
            changes.collect()
        })
        .await
    }

    /// Opens the file for each query, because a damaged file may have been replaced since the last
    /// one.
    async fn read<T: Send + 'static>(
        &self,
        query: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        // The semaphore is never closed.
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        let path = self.path.clone();
        let read = spawn_blocking(move || {
            let _permit = permit;
            let connection = sqlite_file::attach(&path, FORMAT)?;
            let started = Instant::now();
            let is_late = move || started.elapsed() > QUERY_TIMEOUT;
            let limited = connection.progress_handler(10_000, Some(is_late));
            let read = limited.and_then(|()| query(&connection));
            read.map_err(|error| StoreError::History(error.into()))
        });
        within(QUERY_TIMEOUT, StoreError::History, read).await?
    }
}

fn millis(time: Moment) -> i64 {
    time.micros() / 1_000
}
