//! Inspects a queue and its dead letters, for operators.

use crate::amqp::BrokerUrl;
use crate::queue::config::Config;
use crate::queue::dead_letter::{DeadLetter, DeadLetterAction, Selection};
use crate::queue::error::InspectError;
use crate::queue::gauges::Depths;
use crate::queue::{amqp, sqlite};

/// Inspects a queue while other processes use it.
pub struct Inspector(Inner);

enum Inner {
    Amqp(Box<amqp::Inspector>),
    Sqlite(sqlite::Inspector),
}

impl Inspector {
    /// Connects to the broker, or opens the file, which must exist.
    ///
    /// # Errors
    /// [`InspectError`].
    pub async fn open(config: &Config) -> Result<Self, InspectError> {
        Ok(Self(match &config.amqp_uri {
            BrokerUrl::Amqp(uri) => {
                let inspector = amqp::Inspector::open(config.access(uri), &config.queue);
                Inner::Amqp(Box::new(inspector.await?))
            }
            BrokerUrl::Sqlite(location) => {
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

    /// Applies `action` once to each current dead letter that `selection` selects, and passes the
    /// letter to `on_done` when the action is durable. If the future is dropped or the process is
    /// killed, no letter is lost, but on RabbitMQ a redriven letter may also remain a dead letter.
    ///
    /// On RabbitMQ, the inspector holds all other letters until the end, and then gives them back
    /// in order. Meanwhile, another inspector does not find them.
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
