//! Looking into the file, beside the process that owns it.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rusqlite::{Connection, Row, TransactionBehavior, params};
use tokio::task::spawn_blocking;

use super::queue::{FORMAT, moment, oldest_at};
use crate::inspector::{DeadLetter, Depths, InspectError, Selection, Treatment};
use crate::{Origin, message};

/// Dead letters that are treated in one transaction, for which the queue's owner has to wait.
const PAGE: u32 = 500;
/// Between two of them the owner must get its turn: SQLite lets it wait by sleeping and looking again,
/// for up to 25 ms at first, and knows no queue.
const PAUSE_MIN: Duration = Duration::from_millis(30);

/// See [`crate::Inspector`].
pub(crate) struct Inspector {
    path: PathBuf,
    connection: Arc<Mutex<Connection>>,
}

impl Inspector {
    pub(crate) async fn open(path: &Path) -> Result<Self, InspectError> {
        let path = path.to_owned();
        let attach = {
            let path = path.clone();
            move || embedded::attach(&path, FORMAT)
        };
        let attached = spawn_blocking(attach).await.map_err(|error| failed(&path, error))?;
        Ok(Self { path, connection: Arc::new(Mutex::new(attached?)) })
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

    /// When the oldest message was published, taken or not.
    pub(super) async fn oldest_at(&self) -> Result<Option<SystemTime>, InspectError> {
        self.with_connection(|connection| oldest_at(connection)).await
    }

    pub(crate) async fn dead_letters(
        &self,
        selection: &Selection,
        treatment: Treatment,
        mut treated: impl FnMut(DeadLetter) + Send,
    ) -> Result<(), InspectError> {
        // What is given up while this goes on, maybe for the second time, is not meant.
        let last = "SELECT coalesce(max(seq), 0) FROM dead_letter";
        let last: i64 = self
            .with_connection(move |connection| connection.query_row(last, [], |row| row.get(0)))
            .await?;
        let mut after = 0;
        while after < last {
            let selection = selection.clone();
            let started = Instant::now();
            let page = self.with_connection(move |connection| {
                treat_page(connection, after, last, &selection, treatment)
            });
            let (letters, end) = page.await?;
            letters.into_iter().for_each(&mut treated);
            after = end;
            if treatment != Treatment::Look && after < last {
                tokio::time::sleep(PAUSE_MIN.max(started.elapsed() * 4)).await;
            }
        }
        Ok(())
    }

    /// Runs `look` on a thread that may block.
    async fn with_connection<T: Send + 'static>(
        &self,
        look: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, InspectError> {
        let connection = Arc::clone(&self.connection);
        let look = move || look(&mut connection.lock().unwrap_or_else(PoisonError::into_inner));
        let looked = spawn_blocking(look).await.map_err(|error| failed(&self.path, error))?;
        looked.map_err(|error| failed(&self.path, error))
    }
}

fn failed(path: &Path, source: impl Into<Box<dyn Error + Send + Sync>>) -> InspectError {
    InspectError::File { path: path.to_owned(), source: source.into() }
}

/// Treats a page of the letters after number `after`, up to `last`. Says which, and the page's end.
fn treat_page(
    connection: &mut Connection,
    after: i64,
    last: i64,
    selection: &Selection,
    treatment: Treatment,
) -> rusqlite::Result<(Vec<DeadLetter>, i64)> {
    let behavior = match treatment {
        Treatment::Look => TransactionBehavior::Deferred,
        Treatment::Redrive | Treatment::Purge => TransactionBehavior::Immediate,
    };
    let transaction = connection.transaction_with_behavior(behavior)?;
    let page = transaction
        .prepare("SELECT * FROM dead_letter WHERE seq > ?1 AND seq <= ?2 ORDER BY seq LIMIT ?3")?
        .query_map(params![after, last, PAGE], |row| Ok((row.get("seq")?, letter(row)?)))?
        .collect::<rusqlite::Result<Vec<(i64, DeadLetter)>>>()?;
    let end = page.last().map_or(last, |(seq, _)| *seq);
    let mut letters = Vec::new();
    for (seq, letter) in page.into_iter().filter(|(_, letter)| selection.fits(letter)) {
        if treatment == Treatment::Redrive {
            let redrive = "INSERT INTO message (object_id, callback_id, published_at)
                           SELECT object_id, callback_id, published_at
                           FROM dead_letter WHERE seq = ?1";
            transaction.prepare_cached(redrive)?.execute([seq])?;
        }
        if treatment != Treatment::Look {
            let purge = "DELETE FROM dead_letter WHERE seq = ?1";
            transaction.prepare_cached(purge)?.execute([seq])?;
        }
        letters.push(letter);
    }
    transaction.commit()?;
    Ok((letters, end))
}

fn letter(row: &Row) -> rusqlite::Result<DeadLetter> {
    let time = |column| Ok::<_, rusqlite::Error>(moment(row.get(column)?));
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
