//! Publishes events about committed changes.
//!
//! Decision: docs/decisions/0049-why-are-events-published-without-confirms.md

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::exchange::{Exchange, Sender, Transport};
use crate::rabbit::{self, Outgoing, SequenceCounter};
use crate::{Kind, LinkStatus, Notification, Object};

/// Objects in one message, which takes about 60 bytes for each.
const OBJECTS_MAX: usize = 1_000;
/// Messages that wait to be published: 6 MB if each is full.
const WAITING_MAX: usize = 256;
/// How long [`Emitter::close`] waits for the remaining messages to be published.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Publishes events without ever waiting. It drops an event that cannot be published at once;
/// subscribers notice the missing sequence number. Clones share one sequence.
#[derive(Clone)]
pub struct Emitter(Outlet);

/// The sending side of a [`Transport`].
#[derive(Clone)]
enum Outlet {
    Disabled,
    InProcess(Sender),
    Rabbit {
        outbox: mpsc::Sender<Outgoing>,
        sequence: SequenceCounter,
        status: watch::Receiver<LinkStatus>,
    },
}

impl Emitter {
    /// On RabbitMQ, starts the task that connects and publishes. RabbitMQ's management page shows
    /// the connection as `name`.
    #[must_use]
    pub fn start(exchange: &Exchange, name: &str) -> Self {
        metrics::describe_counter!(
            "lastseen_event_messages_total",
            "Messages about committed changes, by whether they were sent or dropped."
        );
        for outcome in ["sent", "dropped"] {
            metrics::counter!("lastseen_event_messages_total", "outcome" => outcome).increment(0);
        }
        Self(match &exchange.0 {
            Transport::Disabled => Outlet::Disabled,
            Transport::InProcess(sender) => Outlet::InProcess(sender.clone()),
            Transport::Rabbit(rabbit) => {
                let (outbox, messages) = mpsc::channel(WAITING_MAX);
                let (status, watched) = watch::channel(Err("not connected yet".to_owned()));
                let sequence = SequenceCounter::default();
                let outbound = rabbit::Outbound { messages, sequence: sequence.clone() };
                let publish =
                    rabbit::publish_all(Arc::clone(rabbit), name.to_owned(), outbound, status);
                tokio::spawn(publish);
                Outlet::Rabbit { outbox, sequence, status: watched }
            }
        })
    }

    /// Publishes events about `objects`, or drops them. Returns at once in either case.
    pub fn publish(&self, kind: Kind, objects: impl ExactSizeIterator<Item = Object>) {
        if objects.len() == 0 {
            return;
        }
        match &self.0 {
            Outlet::Disabled => {}
            Outlet::InProcess(sender) => {
                if sender.receiver_count() > 0 {
                    // An error means that the last subscriber has just been dropped.
                    let _ = sender.send(Arc::new(Notification::Committed(kind, objects.collect())));
                }
            }
            Outlet::Rabbit { outbox, sequence, .. } => {
                let objects: Vec<Object> = objects.collect();
                // Locked until all are queued, so that messages are sent in the order of their
                // numbers.
                let mut last = sequence.lock();
                for objects in objects.chunks(OBJECTS_MAX) {
                    *last += 1;
                    let objects = objects.to_vec();
                    let message = Outgoing { kind, sequence: *last, objects };
                    if outbox.try_send(message).is_err() {
                        rabbit::count("dropped");
                    }
                }
            }
        }
    }

    /// Leaves a gap in the sequence numbers, because a change may have been committed that cannot
    /// be published, for this reason. Subscribers then read the table within seconds.
    pub fn leave_gap(&self, reason: &str) {
        match &self.0 {
            Outlet::Disabled => {}
            Outlet::InProcess(sender) => {
                // An error means that there is no subscriber.
                let _ = sender.send(Arc::new(Notification::Missed(reason.to_owned())));
            }
            // If no event follows, the publisher task publishes a message that shows the gap.
            Outlet::Rabbit { sequence, .. } => *sequence.lock() += 1,
        }
    }

    /// Whether events reach the broker; `None` if there is no connection involved.
    #[must_use]
    pub fn status(&self) -> Option<watch::Receiver<LinkStatus>> {
        match &self.0 {
            Outlet::Rabbit { status, .. } => Some(status.clone()),
            Outlet::Disabled | Outlet::InProcess(_) => None,
        }
    }

    /// Returns only if the publisher task has died. All events would be dropped from then on.
    pub async fn died(&self) {
        match &self.0 {
            Outlet::Rabbit { outbox, .. } => outbox.closed().await,
            Outlet::Disabled | Outlet::InProcess(_) => std::future::pending().await,
        }
    }

    /// Waits up to 2 s until the remaining messages are published, which happens only if every
    /// other clone has been dropped.
    pub async fn close(self) {
        let Outlet::Rabbit { outbox, mut status, .. } = self.0 else { return };
        drop(outbox);
        let ended = async { while status.changed().await.is_ok() {} };
        if timeout(CLOSE_TIMEOUT, ended).await.is_err() {
            tracing::debug!("the broker did not accept the last events in time; dropping them");
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn death_of_the_publisher_task_is_noticed() {
        let (outbox, messages) = mpsc::channel(1);
        let (_, status) = watch::channel(Ok(()));
        let sequence = SequenceCounter::default();
        let emitter = Emitter(Outlet::Rabbit { outbox, sequence, status });
        assert!(emitter.died().now_or_never().is_none());
        drop(messages);
        assert!(emitter.died().now_or_never().is_some());
        let disabled = Emitter::start(&Exchange::disabled(), "test");
        assert!(disabled.died().now_or_never().is_none());
    }
}
