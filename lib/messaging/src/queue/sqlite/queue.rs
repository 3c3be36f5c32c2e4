//! The file: its schema and its statements.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use runtime::Supervisor;
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use sqlite_file::{File, Format, OpenError, Table, WriteError};
use tokio::sync::{Notify, Semaphore};

use crate::queue::disposition::Disposition;
use crate::queue::origin::Origin;
use crate::queue::retry;

/// Times are in milliseconds since 1970. A `callback_id` may also contain a span: see
/// [`Origin::to_text`].
pub(crate) const FORMAT: Format = Format {
    name: "queue",
    application_id: u32::from_be_bytes(*b"LSQu"),
    version: 1,
    schema: "
        -- Ready or in flight. A consumer reads the messages after the last one that it took, so a
        -- number is never used twice (AUTOINCREMENT).
        CREATE TABLE message (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            object_id INTEGER NOT NULL,
            callback_id TEXT NOT NULL,
            published_at INTEGER NOT NULL,
            attempts INTEGER NOT NULL DEFAULT 0 CHECK (attempts BETWEEN 0 AND 1000000),
            reason TEXT,
            first_failed_at INTEGER,
            last_failed_at INTEGER
        ) STRICT;
        -- Failed. At due_at, each becomes a new message.
        CREATE TABLE delayed (
            seq INTEGER PRIMARY KEY,
            due_at INTEGER NOT NULL,
            object_id INTEGER NOT NULL,
            callback_id TEXT NOT NULL,
            published_at INTEGER NOT NULL,
            attempts INTEGER NOT NULL CHECK (attempts BETWEEN 0 AND 1000000),
            reason TEXT NOT NULL,
            first_failed_at INTEGER NOT NULL,
            last_failed_at INTEGER NOT NULL
        ) STRICT;
        CREATE INDEX delayed_due_at ON delayed (due_at);
        -- Given up, in order, kept for a person.
        CREATE TABLE dead_letter (
            seq INTEGER PRIMARY KEY AUTOINCREMENT,
            object_id INTEGER NOT NULL,
            callback_id TEXT NOT NULL,
            published_at INTEGER NOT NULL,
            attempts INTEGER NOT NULL CHECK (attempts BETWEEN 0 AND 1000000),
            reason TEXT NOT NULL,
            first_failed_at INTEGER NOT NULL,
            last_failed_at INTEGER NOT NULL
        ) STRICT;",
    additions: "",
    ballast_bytes: 0,
    max_bytes: u64::MAX,
    // A delayed message is copied as a ready one, because its number may belong to another message
    // in the new file.
    tables: &[
        Table { from: "message", into: "message", columns: COPIED_COLUMNS },
        Table { from: "delayed", into: "message", columns: COPIED_COLUMNS },
        Table { from: "dead_letter", into: "dead_letter", columns: COPIED_COLUMNS },
    ],
};
const COPIED_COLUMNS: &str =
    "object_id, callback_id, published_at, attempts, reason, first_failed_at, last_failed_at";

/// The producer's spool. It can be emptied on a full disk, because the ballast reserves the space
/// in which the write-ahead log grows and is checkpointed.
pub(crate) const SPOOL: Format = Format { name: "spool", ballast_bytes: 16 << 20, ..FORMAT };

/// The most messages of all callers that wait to be committed. At this limit, further callers wait
/// up to their deadlines. A larger batch is accepted when no other message waits.
const MAX_OUTSTANDING: u32 = 20_000;
/// The most delayed messages that become ready in one transaction.
const DUE_MAX: u32 = 1_000;

/// A message that was taken from the file.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) seq: i64,
    pub(super) object_id: i64,
    /// See [`Origin::from_text`].
    pub(super) origin: String,
    pub(super) published_at: i64,
    pub(super) attempts: u32,
    pub(super) redelivered: bool,
}

/// A queue in a file, open in the process that owns it.
pub(crate) struct Queue {
    pub(super) path: PathBuf,
    pub(crate) file: File,
    permits: Arc<Semaphore>,
    /// The number of the last message when the file was opened. Messages up to this number may have
    /// been delivered before.
    last_seq_at_open: i64,
    delivered: Mutex<Delivered>,
    /// Locked while messages are taken, so that no message is taken twice.
    take_lock: tokio::sync::Mutex<()>,
    /// Notifies waiting consumers that there may be messages.
    pub(super) arrived: Notify,
}

struct Delivered {
    /// The number of the last message that was taken.
    last_seq: i64,
    /// Messages that were taken and given back, by sequence number.
    returned: BTreeMap<i64, Message>,
}

impl Queue {
    /// Opens the file with [`FORMAT`] or [`SPOOL`]. Creates it if it does not exist.
    pub(crate) fn open(
        path: &Path,
        format: Format,
        supervisor: &Supervisor,
    ) -> Result<Self, OpenError> {
        let last = |connection: &Connection| {
            let sql = "SELECT coalesce(max(seq), 0) FROM message";
            connection.query_row(sql, [], |row| row.get(0))
        };
        let (file, last_seq_at_open) = File::open_and_read(path, format, supervisor, last)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            permits: Arc::new(Semaphore::new(MAX_OUTSTANDING as usize)),
            last_seq_at_open,
            delivered: Mutex::new(Delivered { last_seq: 0, returned: BTreeMap::new() }),
            take_lock: tokio::sync::Mutex::default(),
            arrived: Notify::new(),
        })
    }

    /// Closes the file, unless there are other references to the queue.
    pub(crate) async fn close(self: Arc<Self>) {
        if let Some(queue) = Arc::into_inner(self) {
            queue.file.close().await;
        }
    }

    /// Adds a message for each of `ids`, and returns when they are on disk.
    pub(crate) async fn publish(&self, origin: Origin<'_>, ids: &[i64]) -> Result<(), WriteError> {
        let wanted = u32::try_from(ids.len()).unwrap_or(u32::MAX).min(MAX_OUTSTANDING);
        // The semaphore is never closed. If it were, only the bound would be missing.
        let permits = Arc::clone(&self.permits).acquire_many_owned(wanted).await;
        let (origin, ids) = (origin.to_text(), ids.to_vec());
        let published_at = now();
        let insert = move |connection: &Connection| {
            let mut insert = connection.prepare_cached(
                "INSERT INTO message (object_id, callback_id, published_at) VALUES (?1, ?2, ?3)",
            )?;
            for id in ids {
                insert.execute(params![id, origin, published_at])?;
            }
            // The permits are held until the transaction is committed.
            Ok(permits)
        };
        drop(self.file.transact(insert).await?);
        self.arrived.notify_waiters();
        Ok(())
    }

    /// Takes up to `limit` messages that are not in flight, oldest first. Dropping the future loses
    /// no message.
    pub(super) async fn take(&self, limit: u16) -> Result<VecDeque<Message>, WriteError> {
        let _guard = self.take_lock.lock().await;
        let after = {
            let mut delivered = self.delivered.lock();
            if !delivered.returned.is_empty() {
                let oldest = std::iter::from_fn(|| delivered.returned.pop_first());
                return Ok(oldest.map(|(_, message)| message).take(limit.into()).collect());
            }
            delivered.last_seq
        };
        let last_seq_at_open = self.last_seq_at_open;
        let take = move |connection: &Connection| {
            make_due_ready(connection)?;
            let mut select = connection.prepare_cached(
                "SELECT seq, object_id, callback_id, published_at, attempts FROM message
                 WHERE seq > ?1 ORDER BY seq LIMIT ?2",
            )?;
            let message = |row: &Row| {
                let seq = row.get("seq")?;
                Ok(Message {
                    seq,
                    object_id: row.get("object_id")?,
                    origin: row.get("callback_id")?,
                    published_at: row.get("published_at")?,
                    attempts: row.get("attempts")?,
                    redelivered: seq <= last_seq_at_open,
                })
            };
            let rows = select.query_map(params![after, limit], message)?;
            rows.collect::<rusqlite::Result<VecDeque<_>>>()
        };
        let messages = self.file.transact(take).await?;
        if let Some(last) = messages.back() {
            self.delivered.lock().last_seq = last.seq;
        }
        Ok(messages)
    }

    /// Gives taken messages back, so that they are delivered again.
    pub(super) fn give_back(&self, messages: impl IntoIterator<Item = Message>) {
        let redelivered =
            |message: Message| (message.seq, Message { redelivered: true, ..message });
        self.delivered.lock().returned.extend(messages.into_iter().map(redelivered));
        self.arrived.notify_waiters();
    }

    /// Settles a taken message in one transaction.
    pub(super) async fn settle(
        &self,
        seq: i64,
        attempts: u32,
        disposition: Disposition,
    ) -> Result<(), WriteError> {
        let is_requeued = disposition == Disposition::Requeue;
        let settle = move |connection: &Connection| {
            match disposition {
                Disposition::Ack => {}
                Disposition::Retry { reason, after } => {
                    let delay =
                        retry::delay(attempts.saturating_add(1), after, rand::random()).length;
                    let due_at = now().saturating_add(milliseconds(delay));
                    let mut insert = connection.prepare_cached(DELAY)?;
                    insert.execute(params![seq, reason, now(), due_at])?;
                }
                Disposition::Requeue => {
                    copy_to_end(connection, "message", seq)?;
                }
                Disposition::DeadLetter { reason } => {
                    connection.prepare_cached(DEAD_LETTER)?.execute(params![seq, reason, now()])?;
                }
            }
            connection.prepare_cached("DELETE FROM message WHERE seq = ?1")?.execute([seq])?;
            Ok(())
        };
        self.file.transact(settle).await?;
        if is_requeued {
            self.arrived.notify_waiters();
        }
        Ok(())
    }
}

const DELAY: &str = "
    INSERT INTO delayed (seq, due_at, object_id, callback_id, published_at, attempts, reason,
                         first_failed_at, last_failed_at)
    SELECT seq, ?4, object_id, callback_id, published_at, attempts + 1, ?2,
           coalesce(first_failed_at, ?3), ?3
    FROM message WHERE seq = ?1";
const DEAD_LETTER: &str = "
    INSERT INTO dead_letter (object_id, callback_id, published_at, attempts, reason,
                             first_failed_at, last_failed_at)
    SELECT object_id, callback_id, published_at, attempts + 1, ?2,
           coalesce(first_failed_at, ?3), ?3
    FROM message WHERE seq = ?1";

/// Moves delayed messages that are due to the end of the queue, as new messages.
fn make_due_ready(connection: &Connection) -> rusqlite::Result<()> {
    // If a message is due later than the longest delay from now, the clock was set back, and the
    // message is ready.
    let (now, too_far) = (now(), now().saturating_add(milliseconds(retry::LONGEST)));
    let due =
        "SELECT seq FROM delayed WHERE due_at <= ?1 OR due_at > ?2 ORDER BY due_at, seq LIMIT ?3";
    let seqs = connection
        .prepare_cached(due)?
        .query_map(params![now, too_far, DUE_MAX], |row| row.get(0))?
        .collect::<rusqlite::Result<Vec<i64>>>()?;
    for seq in seqs {
        copy_to_end(connection, "delayed", seq)?;
        connection.prepare_cached("DELETE FROM delayed WHERE seq = ?1")?.execute([seq])?;
    }
    Ok(())
}

/// Adds a copy of the row of `table` to the end of the queue.
fn copy_to_end(connection: &Connection, table: &str, seq: i64) -> rusqlite::Result<usize> {
    let sql = format!(
        "INSERT INTO message ({COPIED_COLUMNS}) SELECT {COPIED_COLUMNS} FROM {table} WHERE seq = ?1"
    );
    connection.prepare_cached(&sql)?.execute([seq])
}

/// When the oldest message was published, in flight or not.
pub(crate) fn oldest_at(connection: &Connection) -> rusqlite::Result<Option<SystemTime>> {
    let sql = "SELECT published_at FROM message ORDER BY seq LIMIT 1";
    let head = connection.prepare_cached(sql)?.query_row([], |row| row.get(0)).optional()?;
    Ok(head.and_then(time_from_milliseconds))
}

pub(super) fn time_from_milliseconds(milliseconds: i64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_millis(u64::try_from(milliseconds).ok()?))
}

fn now() -> i64 {
    milliseconds(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
