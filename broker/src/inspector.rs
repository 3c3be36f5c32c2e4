//! Looking at a queue from outside, and treating its dead letters.

use std::time::SystemTime;

use embedded::OpenError;

use crate::config::{Backend, Config};
use crate::{amqp, sqlite};

/// How many messages a queue holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depths {
    /// Ready to be delivered; in a file, those in flight as well.
    pub ready: u64,
    /// Failed and waiting to be tried again.
    pub delayed: u64,
    /// Dead letters.
    pub dead: u64,
}

/// A message that was given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// The object it names; `None` if it cannot be read.
    pub id: Option<i64>,
    /// The message as it was published.
    pub body: Vec<u8>,
    /// The callback that named the object; empty for a message of the Go producer.
    pub callback_id: String,
    /// Why it was given up.
    pub reason: String,
    /// How many attempts have failed.
    pub attempts: u32,
    /// When it was published, to the second.
    pub published_at: Option<SystemTime>,
    /// When an attempt first failed.
    pub first_failed_at: Option<SystemTime>,
    /// When the last attempt failed.
    pub last_failed_at: Option<SystemTime>,
}

/// Which dead letters are meant: those that fit all that is given, so by default all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// Of one of these objects; of any, if empty.
    pub ids: Vec<i64>,
    /// With this text in the reason.
    pub reason: Option<String>,
}

/// What to do with dead letters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Nothing; they stay.
    Look,
    /// Make them messages again, as if they had just been published, at the end of the queue.
    Redrive,
    /// Delete them.
    Purge,
}

/// Why a look at the queue ended early.
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
        /// SQLite's answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The broker is away, has gone away, or refuses.
    #[error("the broker is away: {0}")]
    Away(String),
}

/// A look at a queue, beside the processes that use it.
pub struct Inspector(Inner);

enum Inner {
    Amqp(Box<amqp::Inspector>),
    Sqlite(sqlite::Inspector),
}

impl Selection {
    /// Whether `letter` is meant.
    #[must_use]
    pub fn fits(&self, letter: &DeadLetter) -> bool {
        let by_id = self.ids.is_empty() || letter.id.is_some_and(|id| self.ids.contains(&id));
        by_id && self.reason.as_ref().is_none_or(|reason| letter.reason.contains(reason))
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

    /// How many messages there are right now.
    ///
    /// # Errors
    /// [`InspectError`].
    pub async fn depths(&mut self) -> Result<Depths, InspectError> {
        match &mut self.0 {
            Inner::Amqp(inspector) => inspector.depths().await,
            Inner::Sqlite(inspector) => inspector.depths().await,
        }
    }

    /// Goes once through the dead letters that are there now, treats those that `selection` means,
    /// and passes each to `treated` when that is durable. If it is dropped or killed midway, none is
    /// lost; by RabbitMQ, some may have been redriven and still lie there.
    ///
    /// Meanwhile RabbitMQ's other letters are taken too, and go back in their order in the end;
    /// another look finds none of them before.
    ///
    /// # Errors
    /// [`InspectError`]; what was passed to `treated` before stays done.
    pub async fn dead_letters(
        &mut self,
        selection: &Selection,
        treatment: Treatment,
        treated: impl FnMut(DeadLetter) + Send,
    ) -> Result<(), InspectError> {
        match &mut self.0 {
            Inner::Amqp(inspector) => inspector.dead_letters(selection, treatment, treated).await,
            Inner::Sqlite(inspector) => inspector.dead_letters(selection, treatment, treated).await,
        }
    }

    /// Says goodbye to the broker. Dropping it does no harm either, but leaves a warning in the
    /// broker's log.
    pub async fn close(self) {
        if let Inner::Amqp(inspector) = self.0 {
            inspector.close().await;
        }
    }
}
