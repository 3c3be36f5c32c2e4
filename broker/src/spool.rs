//! The queue in a file as a second place, for what a broker does not take.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use embedded::{Format, OpenError, WriteError};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::sqlite::{Queue, SPOOL};
use crate::{LinkStatus, Origin};

/// Messages that wait on this disk for a broker. One process has it, and in it one reader: that takes
/// the oldest, publishes them, and removes them only when they are confirmed.
pub struct Spool {
    queue: Arc<Queue>,
}

/// Why messages are not known to be in the spool. Some of them may be all the same.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SpoolError {
    /// It is full, or its file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The disk did not have them in time.
    #[error("the spool did not take them within {0:?}")]
    Timeout(Duration),
}

/// A message that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spooled {
    /// Its number: the oldest has the lowest.
    pub number: i64,
    /// The object.
    pub id: i64,
    /// Where it comes from, as the file has it.
    origin: String,
}

impl Spooled {
    /// Where it comes from.
    #[must_use]
    pub fn origin(&self) -> Origin<'_> {
        Origin::from_text(&self.origin)
    }
}

impl Spool {
    /// Opens the spool in the file at `path`, with what an earlier process has left in it, or makes
    /// an empty one. It holds up to `max_bytes`, and somewhat more in its log and its ballast.
    ///
    /// # Errors
    /// [`OpenError`]; then the file is as it was.
    pub fn open(path: &Path, max_bytes: u64) -> Result<Self, OpenError> {
        let queue = Arc::new(Queue::open_as(path, Format { max_bytes, ..SPOOL })?);
        Ok(Self { queue })
    }

    /// Adds a message for each of `ids`; they are on disk on return.
    ///
    /// # Errors
    /// [`SpoolError`], at the latest after `within`.
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

    /// Up to `limit` messages, the oldest first. They stay until they are removed.
    ///
    /// # Errors
    /// [`WriteError`] when the file cannot be read.
    pub async fn oldest(&self, limit: usize) -> Result<Vec<Spooled>, WriteError> {
        let messages = self.queue.oldest(limit).await?;
        let spooled = |(number, id, origin)| Spooled { number, id, origin };
        Ok(messages.into_iter().map(spooled).collect())
    }

    /// Removes the messages of these numbers for good. It goes on a full disk too, if only when it is
    /// tried again.
    ///
    /// # Errors
    /// [`WriteError`] when the file could not be written for now: they are still there.
    pub async fn remove(&self, numbers: Vec<i64>) -> Result<(), WriteError> {
        self.queue.remove(numbers).await
    }

    /// How many messages wait; of a batch that was removed in part, all from the first that was left.
    ///
    /// # Errors
    /// [`WriteError`] when the file cannot be read.
    pub async fn count(&self) -> Result<u64, WriteError> {
        self.queue.count().await
    }

    /// When the oldest message came; `None` if there is none.
    ///
    /// # Errors
    /// [`WriteError`] when the file cannot be read.
    pub async fn oldest_at(&self) -> Result<Option<SystemTime>, WriteError> {
        self.queue.oldest_at().await
    }

    /// Whether the spool takes messages. While it does not, a write is tried each second.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.queue.status()
    }

    /// `Err` while a damaged spool is kept beside this one: which, and what is to be done with it.
    #[must_use]
    pub fn kept(&self) -> watch::Receiver<LinkStatus> {
        self.queue.kept()
    }

    /// Returns only if nothing writes the file any more, because it is damaged or no longer at its place.
    /// Opened again, the same path leads to a spool that works.
    pub async fn died(&self) {
        self.queue.died().await;
    }

    /// Closes the file.
    pub async fn close(self) {
        self.queue.close().await;
    }
}
