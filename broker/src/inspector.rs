//! Inspects a queue and its dead letters, for operators.

use std::time::SystemTime;

use embedded::OpenError;

use crate::config::{Backend, Config};
use crate::{amqp, sqlite};

/// The number of messages in the queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depths {
    /// Ready to be delivered. For a queue in a file, this includes messages in flight.
    pub ready: u64,
    /// Waiting for the next attempt.
    pub delayed: u64,
    /// Dead letters.
    pub dead: u64,
}

/// A message that was given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// The object; `None` if the body cannot be decoded.
    pub id: Option<i64>,
    /// The message as it was published.
    pub body: Vec<u8>,
    /// The callback that named the object; empty for a message of the Go producer.
    pub callback_id: String,
    /// Why the message was given up.
    pub reason: String,
    /// The number of failed attempts.
    pub attempts: u32,
    /// When the message was published, to the second.
    pub published_at: Option<SystemTime>,
    /// When the first attempt failed.
    pub first_failed_at: Option<SystemTime>,
    /// When the last attempt failed.
    pub last_failed_at: Option<SystemTime>,
}

/// Selects the dead letters that match all criteria; by default, all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Ids of objects; empty selects all.
    pub ids: Vec<i64>,
    /// A text that the reason contains.
    pub reason: Option<String>,
}

/// What to do with dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadLetterAction {
    /// List them and leave them as they are.
    List,
    /// Send them back to the end of the queue, as if they had just been published.
    Redrive,
    /// Delete them.
    Purge,
}

/// Why an operation of the inspector failed.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The file cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The file cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// SQLite's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The broker is away, the connection was lost, or the broker refused the operation.
    #[error("the broker is away: {0}")]
    Away(String),
}

/// Inspects a queue while other processes use it.
pub struct Inspector(Inner);

enum Inner {
    Amqp(Box<amqp::Inspector>),
    Sqlite(sqlite::Inspector),
}

impl Selection {
    /// Whether `letter` matches all criteria.
    #[must_use]
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        let matches_id = self.ids.is_empty() || letter.id.is_some_and(|id| self.ids.contains(&id));
        matches_id && self.reason.as_ref().is_none_or(|reason| letter.reason.contains(reason))
    }
}

impl Inspector {
    /// Connects to the broker, or opens the file, which must exist.
    ///
    /// # Errors
    /// [`InspectError`].
    pub async fn open(config: &Config) -> Result<Self, InspectError> {
        Ok(Self(match &config.amqp_uri.0 {
            Backend::Amqp(uri) => {
                let access = config.access_with(uri);
                let config = amqp::Config { access, queue: config.queue.clone() };
                Inner::Amqp(Box::new(amqp::Inspector::open(config).await?))
            }
            Backend::Sqlite(location) => {
                Inner::Sqlite(sqlite::Inspector::open(location.path()).await?)
            }
        }))
    }

    /// Counts the messages in the queues now.
    ///
    /// # Errors
    /// [`InspectError`].
    pub async fn depths(&mut self) -> Result<Depths, InspectError> {
        match &mut self.0 {
            Inner::Amqp(inspector) => inspector.depths().await,
            Inner::Sqlite(inspector) => inspector.depths().await,
        }
    }

    /// Applies `action` once to all current dead letters that `selection` selects, and passes each
    /// letter to `on_done` when its action is durable. If the future is dropped or the process is
    /// killed, no letter is lost, but on RabbitMQ a redriven letter may also remain a dead letter.
    ///
    /// On RabbitMQ, the other letters are held meanwhile and go back in order at the end. Until
    /// then, another inspector does not find them.
    ///
    /// # Errors
    /// [`InspectError`]; the actions on letters that were passed to `on_done` remain in effect.
    pub async fn dead_letters(
        &mut self,
        selection: &Selection,
        action: DeadLetterAction,
        on_done: impl FnMut(DeadLetter) + Send,
    ) -> Result<(), InspectError> {
        match &mut self.0 {
            Inner::Amqp(inspector) => inspector.dead_letters(selection, action, on_done).await,
            Inner::Sqlite(inspector) => inspector.dead_letters(selection, action, on_done).await,
        }
    }

    /// Closes the connection. Without this, the broker logs a warning about the abrupt end.
    pub async fn close(self) {
        if let Inner::Amqp(inspector) = self.0 {
            inspector.close().await;
        }
    }
}
