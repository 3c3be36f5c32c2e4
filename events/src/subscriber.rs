//! Receives events about committed changes.

use std::sync::Arc;

use tokio::sync::{broadcast, watch};

use crate::exchange::{Exchange, Transport};
use crate::rabbit;
use crate::{Kind, LinkStatus, Object};

/// What a subscriber receives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notification {
    /// These objects have changed.
    Committed(Kind, Vec<Object>),
    /// Changes may have been committed of which no event will arrive, for this reason: the
    /// subscriber has to read the table. Each subscription begins with this.
    Missed(String),
}

/// Receives the events of an exchange, from the first call of [`Subscriber::next`] on.
pub struct Subscriber {
    source: Source,
    status: watch::Sender<LinkStatus>,
}

/// The receiving side of a [`Transport`].
enum Source {
    Disabled,
    InProcess { receiver: broadcast::Receiver<Arc<Notification>>, has_begun: bool },
    Rabbit(Box<rabbit::Subscription>),
}

impl Subscriber {
    /// RabbitMQ's management page shows the connection as `name`.
    #[must_use]
    pub fn new(exchange: &Exchange, name: &str) -> Self {
        let (source, status) = match &exchange.0 {
            Transport::Disabled => {
                (Source::Disabled, Err("AMQP_URI does not name a RabbitMQ".to_owned()))
            }
            Transport::InProcess(sender) => {
                (Source::InProcess { receiver: sender.subscribe(), has_begun: false }, Ok(()))
            }
            Transport::Rabbit(exchange) => {
                let subscription = rabbit::Subscription::new(Arc::clone(exchange), name);
                (Source::Rabbit(Box::new(subscription)), Err("not connected yet".to_owned()))
            }
        };
        Self { source, status: watch::Sender::new(status) }
    }

    /// Whether events can be received.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.subscribe()
    }

    /// Waits for the next notification, and reconnects until it succeeds. A notification may be
    /// lost if the future is dropped.
    pub async fn next(&mut self) -> Notification {
        match &mut self.source {
            Source::Disabled => std::future::pending().await,
            Source::InProcess { has_begun, .. } if !*has_begun => {
                *has_begun = true;
                Notification::Missed("the subscription begins".to_owned())
            }
            Source::InProcess { receiver, .. } => match receiver.recv().await {
                Ok(notification) => Notification::clone(&notification),
                Err(broadcast::error::RecvError::Lagged(count)) => {
                    Notification::Missed(format!("the subscriber was too slow for {count} events"))
                }
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            },
            Source::Rabbit(subscription) => subscription.next(&self.status).await,
        }
    }
}
