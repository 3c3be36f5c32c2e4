//! Inspects the file while another process owns it.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rusqlite::{Connection, Row, TransactionBehavior, params};
use tokio::task::spawn_blocking;

use super::queue::{FORMAT, oldest_at, time_from_milliseconds};
use crate::queue::dead_letter::{DeadLetter, DeadLetterAction, Selection};
use crate::queue::error::InspectError;
use crate::queue::gauges::Depths;
use crate::queue::message;
use crate::queue::origin::Origin;

/// The most dead letters that one transaction processes. The owner of the file waits for each
/// transaction.
const PAGE: u32 = 500;
/// Shortest pause between two transactions, so that the owner can write. SQLite has no queue of
/// waiting writers: the owner sleeps, at first for up to 25 ms, and tries again.
const PAUSE_MIN: Duration = Duration::from_millis(30);

/// See [`crate::queue::Inspector`].
pub(crate) struct Inspector {
    path: PathBuf,
    connection: Arc<Mutex<Connection>>,
}

impl Inspector {
    pub(crate) async fn open(path: &Path) -> Result<Self, InspectError> {
        let file = path.to_owned();
        let attaching = spawn_blocking(move || sqlite_file::attach(&file, FORMAT));
        let attached = attaching.await.map_err(|error| failed(path, error))?;
        Ok(Self { path: path.to_owned(), connection: Arc::new(Mutex::new(attached?)) })
    }

    pub(crate) async fn depths(&self) -> Result<Depths, InspectError> {
        self.with_connection(|connection| {
            let count = |table| {
                let sql = format!("SELECT count(*) FROM {table}");
                connection.query_row(&sql, [], |row| row.get(0))
            };
            Ok(Depths {
                ready: count("message")?,
                delayed: count("delayed")?,
                dead: count("dead_letter")?,
            })
        })
        .await
    }

    /// When the oldest message was published, in flight or not.
    pub(super) async fn oldest_at(&self) -> Result<Option<SystemTime>, InspectError> {
        self.with_connection(|connection| oldest_at(connection)).await
    }

    pub(crate) async fn dead_letters(
        &self,
        selection: &Selection,
        action: DeadLetterAction,
        mut on_done: impl FnMut(DeadLetter) + Send,
    ) -> Result<(), InspectError> {
        // Stop at the current last letter: a message that becomes a dead letter meanwhile is not
        // included, even if this call has just redriven it.
        let sql = "SELECT coalesce(max(seq), 0) FROM dead_letter";
        let last: i64 = self
            .with_connection(move |connection| connection.query_row(sql, [], |row| row.get(0)))
            .await?;
        let mut after = 0;
        while after < last {
            let selection = selection.clone();
            let started = Instant::now();
            let page = self.with_connection(move |connection| {
                process_page(connection, after, last, &selection, action)
            });
            let (letters, end) = page.await?;
            letters.into_iter().for_each(&mut on_done);
            after = end;
            if action != DeadLetterAction::List && after < last {
                tokio::time::sleep(PAUSE_MIN.max(started.elapsed() * 4)).await;
            }
        }
        Ok(())
    }

    /// Runs `operation` on a thread that may block.
    async fn with_connection<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, InspectError> {
        let connection = Arc::clone(&self.connection);
        let run = move || operation(&mut connection.lock());
        let result = spawn_blocking(run).await.map_err(|error| failed(&self.path, error))?;
        result.map_err(|error| failed(&self.path, error))
    }
}

fn failed(path: &Path, source: impl Into<Box<dyn Error + Send + Sync>>) -> InspectError {
    InspectError::File { path: path.to_owned(), source: source.into() }
}

/// Processes a page of the letters after number `after`, up to `last`. Returns the selected letters
/// and the last number of the page.
fn process_page(
    connection: &mut Connection,
    after: i64,
    last: i64,
    selection: &Selection,
    action: DeadLetterAction,
) -> rusqlite::Result<(Vec<DeadLetter>, i64)> {
    let behavior = match action {
        DeadLetterAction::List => TransactionBehavior::Deferred,
        DeadLetterAction::Redrive | DeadLetterAction::Purge => TransactionBehavior::Immediate,
    };
    let transaction = connection.transaction_with_behavior(behavior)?;
    let page = transaction
        .prepare("SELECT * FROM dead_letter WHERE seq > ?1 AND seq <= ?2 ORDER BY seq LIMIT ?3")?
        .query_map(params![after, last, PAGE], |row| Ok((row.get("seq")?, letter(row)?)))?
        .collect::<rusqlite::Result<Vec<(i64, DeadLetter)>>>()?;
    let end = page.last().map_or(last, |(seq, _)| *seq);
    let mut letters = Vec::new();
    for (seq, letter) in page.into_iter().filter(|(_, letter)| selection.matches(letter)) {
        if action == DeadLetterAction::Redrive {
            let redrive = "INSERT INTO message (object_id, callback_id, published_at)
                           SELECT object_id, callback_id, published_at
                           FROM dead_letter WHERE seq = ?1";
            transaction.prepare_cached(redrive)?.execute([seq])?;
        }
        if action != DeadLetterAction::List {
            let purge = "DELETE FROM dead_letter WHERE seq = ?1";
            transaction.prepare_cached(purge)?.execute([seq])?;
        }
        letters.push(letter);
    }
    transaction.commit()?;
    Ok((letters, end))
}

fn letter(row: &Row) -> rusqlite::Result<DeadLetter> {
    let time = |column| Ok::<_, rusqlite::Error>(time_from_milliseconds(row.get(column)?));
    let id = row.get("object_id")?;
    let origin: String = row.get("callback_id")?;
    Ok(DeadLetter {
        id: Some(id),
        body: message::encode(id),
        callback_id: Origin::from_text(&origin).callback_id.to_owned(),
        reason: row.get("reason")?,
        attempts: row.get("attempts")?,
        published_at: time("published_at")?,
        first_failed_at: time("first_failed_at")?,
        last_failed_at: time("last_failed_at")?,
    })
}
