//! Receives events about committed changes and given-up objects.

use std::sync::Arc;

use tokio::sync::{broadcast, watch};

use crate::events::amqp;
use crate::events::change::Notification;
use crate::events::exchange::{Exchange, Transport};
use runtime::Status;

/// Receives the events of an exchange. The first call of [`Subscriber::next`] connects to it.
pub struct Subscriber(Source);

/// The receiving side of a [`Transport`].
enum Source {
    Disabled {
        status: watch::Sender<Status>,
    },
    InProcess {
        receiver: broadcast::Receiver<Arc<Notification>>,
        has_begun: bool,
        status: watch::Sender<Status>,
    },
    Amqp(Box<amqp::Subscription>),
}

impl Subscriber {
    /// `name` identifies the connection on RabbitMQ's management page.
    #[must_use]
    pub fn new(exchange: &Exchange, name: &str) -> Self {
        Self(match &exchange.0 {
            Transport::Disabled => {
                let reason = "AMQP_URI is not the address of a RabbitMQ".to_owned();
                Source::Disabled { status: watch::Sender::new(Err(reason)) }
            }
            Transport::InProcess(sender) => Source::InProcess {
                receiver: sender.subscribe(),
                has_begun: false,
                status: watch::Sender::new(Ok(())),
            },
            Transport::Amqp(exchange) => {
                let subscription = amqp::Subscription::new(Arc::clone(exchange), name);
                Source::Amqp(Box::new(subscription))
            }
        })
    }

    /// Whether events can be received.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        match &self.0 {
            Source::Disabled { status } | Source::InProcess { status, .. } => status.subscribe(),
            Source::Amqp(subscription) => subscription.status(),
        }
    }

    /// Waits for the next notification, and reconnects to the broker as often as needed. A
    /// notification may be lost if the future is dropped.
    pub async fn next(&mut self) -> Notification {
        match &mut self.0 {
            Source::Disabled { .. } => std::future::pending().await,
            Source::InProcess { has_begun, .. } if !*has_begun => {
                *has_begun = true;
                // Earlier events are unknown, so the receiver has to read the table.
                Notification::Missed("the subscription begins".to_owned())
            }
            Source::InProcess { receiver, .. } => match receiver.recv().await {
                Ok(notification) => Notification::clone(&notification),
                Err(broadcast::error::RecvError::Lagged(count)) => {
                    Notification::Missed(format!("the subscriber was too slow for {count} events"))
                }
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            },
            Source::Amqp(subscription) => subscription.next().await,
        }
    }
}
