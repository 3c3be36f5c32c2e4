//! Hearing what was committed.

use std::sync::Arc;

use tokio::sync::{broadcast, watch};

use crate::exchange::{Exchange, Place};
use crate::rabbit;
use crate::{Kind, LinkStatus, Object};

/// What a subscriber hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// It was committed.
    Committed(Kind, Vec<Object>),
    /// Something may have been committed before that is not told any more, for this reason: what
    /// counts is in the table. With it begins each subscription.
    Missed(String),
}

/// Hears what is told on an exchange from the first [`Subscriber::next`] on.
pub struct Subscriber {
    heard: Heard,
    status: watch::Sender<LinkStatus>,
}

enum Heard {
    Nothing,
    InProcess { told: broadcast::Receiver<Arc<Notice>>, begun: bool },
    Rabbit(Box<rabbit::Subscription>),
}

impl Subscriber {
    /// One whose connection, if it takes one, a RabbitMQ's management page shows as `name`.
    #[must_use]
    pub fn new(exchange: &Exchange, name: &str) -> Self {
        let not_yet = Err("not connected yet".to_owned());
        let (heard, status) = match &exchange.0 {
            Place::Nowhere => (Heard::Nothing, Err("AMQP_URI names no RabbitMQ".to_owned())),
            Place::InProcess(sender) => {
                (Heard::InProcess { told: sender.subscribe(), begun: false }, Ok(()))
            }
            Place::Rabbit(rabbit) => {
                let subscription = rabbit::Subscription::new(Arc::clone(rabbit), name);
                (Heard::Rabbit(Box::new(subscription)), not_yet)
            }
        };
        Self { heard, status: watch::Sender::new(status) }
    }

    /// Whether events come in.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.subscribe()
    }

    /// The next notice, however long the broker is away. One may be lost when this is dropped before
    /// it has returned.
    pub async fn next(&mut self) -> Notice {
        match &mut self.heard {
            Heard::Nothing => std::future::pending().await,
            Heard::InProcess { begun, .. } if !*begun => {
                *begun = true;
                Notice::Missed("the subscription begins".to_owned())
            }
            Heard::InProcess { told, .. } => match told.recv().await {
                Ok(told) => Notice::clone(&told),
                Err(broadcast::error::RecvError::Lagged(count)) => {
                    Notice::Missed(format!("{count} batches came too fast"))
                }
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            },
            Heard::Rabbit(subscription) => subscription.next(&self.status).await,
        }
    }
}
