//! Publishes events about committed changes, given-up objects and groups.
//!
//! Decision: docs/decisions/0049-why-are-events-published-without-confirms.md

use std::sync::Arc;
use std::time::Duration;

use runtime::{Needed, Status, Supervisor};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::amqp::Reconnector;
use crate::events::amqp::{self, Outgoing, SequenceCounter};
use crate::events::change::{GivenUp, Kind, Notification, Object};
use crate::events::exchange::{Exchange, Sender, Transport};
use crate::events::group_change::GroupChange;
use crate::events::message::Content;

/// The most objects in one message. Each takes about 60 bytes when encoded.
const OBJECTS_MAX: usize = 1_000;
/// The most groups in one message. Each takes about 200 bytes; with the longest paths, 2 KB.
const GROUPS_MAX: usize = 250;
/// The most messages that wait to be published. If all are full, they take 6 MB of memory; those of
/// groups take 13 MB, with the longest paths 130 MB.
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
    Amqp {
        // Declared before `outbox`, and so dropped first: without `outbox`, the publisher task
        // ends.
        needed: Needed,
        outbox: mpsc::Sender<Outgoing>,
        sequence: SequenceCounter,
        status: watch::Receiver<Status>,
    },
}

impl Emitter {
    /// On RabbitMQ, starts the tokio task that connects and publishes. RabbitMQ's management page
    /// shows the connection as `name`.
    #[must_use]
    pub fn start(exchange: &Exchange, name: &str, supervisor: &Supervisor) -> Self {
        metrics::describe_counter!(
            "lastseen_event_messages_total",
            "Event messages, by whether they were sent or dropped."
        );
        for outcome in ["sent", "dropped"] {
            metrics::counter!("lastseen_event_messages_total", "outcome" => outcome).increment(0);
        }
        Self(match &exchange.0 {
            Transport::Disabled => Outlet::Disabled,
            Transport::InProcess(sender) => Outlet::InProcess(sender.clone()),
            Transport::Amqp(exchange) => {
                let (outbox, messages) = mpsc::channel(WAITING_MAX);
                let reconnector = Reconnector::new(exchange.access.clone(), name);
                let status = reconnector.status();
                let sequence = SequenceCounter::default();
                let (exchange, numbers) = (Arc::clone(exchange), Arc::clone(&sequence));
                let publish = amqp::publish_all(exchange, reconnector, messages, numbers);
                let task = supervisor.spawn_critical(format!("event publisher ({name})"), publish);
                Outlet::Amqp { needed: task.detach(), outbox, sequence, status }
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
            Outlet::Amqp { outbox, sequence, .. } => {
                let objects: Vec<Object> = objects.collect();
                let chunks = objects.chunks(OBJECTS_MAX);
                let contents = chunks.map(|objects| Content::Committed(kind, objects.to_vec()));
                enqueue(outbox, sequence, contents);
            }
        }
    }

    /// Publishes that an object was given up, or drops the event. Returns at once in either case.
    pub fn publish_given_up(&self, object: GivenUp) {
        match &self.0 {
            Outlet::Disabled => {}
            Outlet::InProcess(sender) => {
                // An error means that there is no subscriber.
                let _ = sender.send(Arc::new(Notification::GivenUp(vec![object])));
            }
            Outlet::Amqp { outbox, sequence, .. } => {
                enqueue(outbox, sequence, std::iter::once(Content::GivenUp(vec![object])));
            }
        }
    }

    /// Publishes changes of groups for other programs, or drops them. Returns at once in either
    /// case. Without RabbitMQ there are no other programs, so it drops all of them.
    pub fn publish_groups(&self, changes: Vec<GroupChange>) {
        if let Outlet::Amqp { outbox, sequence, .. } = &self.0 {
            let mut changes = changes.into_iter();
            let chunks = std::iter::from_fn(|| {
                let chunk: Vec<_> = changes.by_ref().take(GROUPS_MAX).collect();
                (!chunk.is_empty()).then_some(Content::Groups(chunk))
            });
            enqueue(outbox, sequence, chunks);
        }
    }

    /// Leaves a gap in the sequence numbers, so that subscribers read the table within seconds. Use
    /// this if changes may have been committed that cannot be published; `reason` says why.
    pub fn leave_gap(&self, reason: &str) {
        match &self.0 {
            Outlet::Disabled => {}
            Outlet::InProcess(sender) => {
                // An error means that there is no subscriber.
                let _ = sender.send(Arc::new(Notification::Missed(reason.to_owned())));
            }
            // If no event follows, the publisher task publishes a message that shows the gap.
            Outlet::Amqp { sequence, .. } => *sequence.lock() += 1,
        }
    }

    /// Whether events reach the broker; `None` if the exchange is not on RabbitMQ.
    #[must_use]
    pub fn status(&self) -> Option<watch::Receiver<Status>> {
        match &self.0 {
            Outlet::Amqp { status, .. } => Some(status.clone()),
            Outlet::Disabled | Outlet::InProcess(_) => None,
        }
    }

    /// Waits up to 2 s until the remaining messages are published. Drop all other clones first:
    /// while one exists, this waits for the whole time.
    pub async fn close(self) {
        let Outlet::Amqp { needed, outbox, mut status, .. } = self.0 else { return };
        drop(needed);
        drop(outbox);
        let ended = async { while status.changed().await.is_ok() {} };
        if timeout(CLOSE_TIMEOUT, ended).await.is_err() {
            tracing::debug!("the broker did not accept the last events in time; dropping them");
        }
    }
}

/// Numbers the messages and queues them. Drops those for which the queue has no room.
fn enqueue(
    outbox: &mpsc::Sender<Outgoing>,
    sequence: &SequenceCounter,
    contents: impl Iterator<Item = Content>,
) {
    // Locked until all messages are queued, so that the publisher task sends them in the order of
    // their numbers.
    let mut last = sequence.lock();
    for content in contents {
        *last += 1;
        if outbox.try_send(Outgoing { sequence: *last, content }).is_err() {
            amqp::count("dropped");
        }
    }
}
