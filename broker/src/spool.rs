//! The spool: a queue in a file, which stores messages while the broker is away.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use embedded::{Format, OpenError, WriteError};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::sqlite::{Queue, SPOOL};
use crate::{LinkStatus, Origin};

/// Messages on the local disk that wait for the broker. One process owns the file. Its relay, the
/// only reader, publishes the oldest messages and removes them when they are confirmed.
pub struct Spool {
    queue: Arc<Queue>,
}

/// Why messages could not be added to the spool. Some may be in it nevertheless.
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
    /// Opens the spool in the file at `path` with its messages, or creates an empty one. The file
    /// holds up to `max_bytes`; its log and ballast take some more space.
    ///
    /// # Errors
    /// [`OpenError`]; the file is unchanged then.
    pub fn open(path: &Path, max_bytes: u64) -> Result<Self, OpenError> {
        let queue = Arc::new(Queue::open_as(path, Format { max_bytes, ..SPOOL })?);
        Ok(Self { queue })
    }

    /// Adds a message for each of `ids`, and returns when they are on disk.
    ///
    /// # Errors
    /// [`SpoolError`], within `within`.
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
        let messages = self.queue.oldest(limit).await?;
        let spooled = |(number, id, origin)| Spooled { number, id, origin };
        Ok(messages.into_iter().map(spooled).collect())
    }

    /// Removes the messages with these numbers. This also works on a full disk, although it may
    /// need a second attempt.
    ///
    /// # Errors
    /// [`WriteError`] if the file cannot be written now; the messages are still in the spool.
    pub async fn remove(&self, numbers: Vec<i64>) -> Result<(), WriteError> {
        self.queue.remove(numbers).await
    }

    /// The number of messages. If later messages were removed before earlier ones, it is too high
    /// until those are removed as well.
    ///
    /// # Errors
    /// [`WriteError`] if the file cannot be read.
    pub async fn count(&self) -> Result<u64, WriteError> {
        self.queue.count().await
    }

    /// When the oldest message was added; `None` if the spool is empty.
    ///
    /// # Errors
    /// [`WriteError`] if the file cannot be read.
    pub async fn oldest_at(&self) -> Result<Option<SystemTime>, WriteError> {
        self.queue.oldest_at().await
    }

    /// Whether the spool accepts messages. While it does not, it tests each second whether it can
    /// write.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.queue.status()
    }

    /// `Err` while a damaged spool is kept beside this one: its name, and what the operator has to
    /// do.
    #[must_use]
    pub fn kept(&self) -> watch::Receiver<LinkStatus> {
        self.queue.kept()
    }

    /// Returns only if the writing thread has died, because the file is damaged or was moved away.
    /// Opening the same path again results in a working spool.
    pub async fn died(&self) {
        self.queue.died().await;
    }

    /// Closes the file.
    pub async fn close(self) {
        self.queue.close().await;
    }
}
