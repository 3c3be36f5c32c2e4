//! The spool: a queue in a file, which stores messages while the broker is away.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use runtime::{Status, Supervisor};
use rusqlite::{Connection, Row};
use sqlite_file::{Format, OpenError, WriteError};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::queue::origin::Origin;
use crate::queue::sqlite::{Queue, SPOOL, oldest_at};

/// Messages on the local disk that wait for the broker. One process owns the file. The relay in
/// that process publishes the oldest messages, and removes them when the broker has confirmed them.
pub struct Spool {
    queue: Arc<Queue>,
}

/// Why messages could not be added to the spool. Some of them may be in the spool nevertheless.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SpoolError {
    /// The spool is full, or its file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The messages were not on disk in time.
    #[error("the spool did not store the messages within {0:?}")]
    Timeout(Duration),
}

/// A message in the spool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spooled {
    /// The number of the message; the oldest has the lowest.
    pub number: i64,
    /// The object's id.
    pub id: i64,
    /// See [`Origin::to_text`].
    origin: String,
}

impl Spooled {
    /// The callback and the span that the message comes from.
    #[must_use]
    pub fn origin(&self) -> Origin<'_> {
        Origin::from_text(&self.origin)
    }
}

impl Spool {
    /// Opens the spool at `path` with the messages in it, or creates an empty spool. `max_bytes`
    /// limits the file, but not its write-ahead log and the reserved disk space
    /// ([`Format::ballast_bytes`]).
    ///
    /// # Errors
    /// [`OpenError`]. The file is then unchanged.
    pub fn open(path: &Path, max_bytes: u64) -> Result<Self, OpenError> {
        // Nothing supervises the spool's thread: when it ends, the producer opens the spool again.
        let supervisor = Supervisor::default();
        let queue = Queue::open(path, Format { max_bytes, ..SPOOL }, &supervisor)?;
        Ok(Self { queue: Arc::new(queue) })
    }

    /// Adds a message for each of `ids`, and returns when they are on disk.
    ///
    /// # Errors
    /// [`SpoolError`], after `within` at the latest.
    pub async fn add(
        &self,
        origin: Origin<'_>,
        ids: &[i64],
        within: Duration,
    ) -> Result<(), SpoolError> {
        match timeout(within, self.queue.publish(origin, ids)).await {
            Ok(added) => Ok(added?),
            Err(_) => Err(SpoolError::Timeout(within)),
        }
    }

    /// Returns up to `limit` messages, oldest first. They stay in the spool until they are removed.
    ///
    /// # Errors
    /// [`WriteError`] if the file cannot be read.
    pub async fn oldest(&self, limit: usize) -> Result<Vec<Spooled>, WriteError> {
        let select = move |connection: &Connection| {
            let sql = "SELECT seq, object_id, callback_id FROM message ORDER BY seq LIMIT ?1";
            let spooled = |row: &Row<'_>| {
                Ok(Spooled { number: row.get(0)?, id: row.get(1)?, origin: row.get(2)? })
            };
            connection.prepare_cached(sql)?.query_map([limit], spooled)?.collect()
        };
        self.queue.file.transact_on_ballast(select).await
    }

    /// Removes the messages with these numbers. This also works on a full disk, although the first
    /// attempt may fail there.
    ///
    /// # Errors
    /// [`WriteError`] if the file cannot be written now; the messages are still in the spool.
    pub async fn remove(&self, numbers: Vec<i64>) -> Result<(), WriteError> {
        let delete = move |connection: &Connection| {
            let mut delete = connection.prepare_cached("DELETE FROM message WHERE seq = ?1")?;
            for number in numbers {
                delete.execute([number])?;
            }
            Ok(())
        };
        self.queue.file.transact_on_ballast(delete).await
    }

    /// The number of messages, computed from the lowest and the highest message number. The result
    /// is too high while an older message remains after a newer one was removed.
    ///
    /// # Errors
    /// [`WriteError`] if the file cannot be read.
    pub async fn count(&self) -> Result<u64, WriteError> {
        let count = |connection: &Connection| {
            // Two queries, because SQLite uses the index for a minimum or maximum only if a query
            // asks for just one of them.
            let sql = "SELECT coalesce((SELECT max(seq) FROM message)
                                     - (SELECT min(seq) FROM message) + 1, 0)";
            connection.prepare_cached(sql)?.query_row([], |row| row.get(0))
        };
        self.queue.file.transact_on_ballast(count).await
    }

    /// When the oldest message was added; `None` if the spool is empty.
    ///
    /// # Errors
    /// [`WriteError`] if the file cannot be read.
    pub async fn oldest_at(&self) -> Result<Option<SystemTime>, WriteError> {
        self.queue.file.transact_on_ballast(oldest_at).await
    }

    /// Whether the spool accepts messages. While it cannot write, it tries again every second.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.queue.file.status()
    }

    /// `Err` while the file of a damaged spool exists beside this one. The text names the file, and
    /// says what the operator has to do.
    #[must_use]
    pub fn kept(&self) -> watch::Receiver<Status> {
        self.queue.file.kept()
    }

    /// Returns when the writing thread has ended, because the file is damaged or was moved away.
    /// Opening the same path again results in a working spool.
    pub async fn ended(&self) {
        self.queue.file.ended().await;
    }

    /// Closes the file.
    pub async fn close(self) {
        self.queue.close().await;
    }
}
