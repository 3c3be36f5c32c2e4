//! Telling what was committed.
//!
//! Decision: docs/decisions/0049-why-are-events-published-without-confirms.md

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::exchange::{Exchange, Place, Sender};
use crate::rabbit::{self, Numbers, Outgoing};
use crate::{Kind, LinkStatus, Notice, Object};

/// Objects in one message; it has some 60 bytes for each.
const OBJECTS_MAX: usize = 1_000;
/// Messages that wait to be sent: with all of their objects, 6 MB.
const WAITING_MAX: usize = 256;
/// How long what waits may take to go out at the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// Tells what was committed, and never waits: what cannot be told at once is dropped, which
/// subscribers notice by a number that is missing. Clones of one are one source.
#[derive(Clone)]
pub struct Emitter(Told);

#[derive(Clone)]
enum Told {
    Nowhere,
    InProcess(Sender),
    Rabbit { outbox: mpsc::Sender<Outgoing>, numbers: Numbers, status: watch::Receiver<LinkStatus> },
}

impl Emitter {
    /// Begins to look after the connection, if it takes one, which a RabbitMQ's management page shows
    /// as `name`.
    #[must_use]
    pub fn start(exchange: &Exchange, name: &str) -> Self {
        metrics::describe_counter!(
            "lastseen_event_messages_total",
            "Messages about what was committed, by whether they were sent or dropped."
        );
        for outcome in ["sent", "dropped"] {
            metrics::counter!("lastseen_event_messages_total", "outcome" => outcome).increment(0);
        }
        Self(match &exchange.0 {
            Place::Nowhere => Told::Nowhere,
            Place::InProcess(sender) => Told::InProcess(sender.clone()),
            Place::Rabbit(rabbit) => {
                let (outbox, waiting) = mpsc::channel(WAITING_MAX);
                let (status, watched) = watch::channel(Err("not connected yet".to_owned()));
                let numbers = Numbers::default();
                let outbound = rabbit::Outbound { waiting, numbers: numbers.clone() };
                let send = rabbit::send(Arc::clone(rabbit), name.to_owned(), outbound, status);
                tokio::spawn(send);
                Told::Rabbit { outbox, numbers, status: watched }
            }
        })
    }

    /// Tells it, or drops it; either at once.
    pub fn tell(&self, kind: Kind, objects: impl ExactSizeIterator<Item = Object>) {
        if objects.len() == 0 {
            return;
        }
        match &self.0 {
            Told::Nowhere => {}
            Told::InProcess(sender) => {
                if sender.receiver_count() > 0 {
                    // Without a receiver by now, there is nobody to tell.
                    let _ = sender.send(Arc::new(Notice::Committed(kind, objects.collect())));
                }
            }
            Told::Rabbit { outbox, numbers, .. } => {
                let objects: Vec<Object> = objects.collect();
                // Held for all of them, so that what goes out is in the order of its numbers.
                let mut last = numbers.lock();
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

    /// Leaves a gap in the sequence numbers, because something may have been committed that cannot be
    /// announced, for this reason: subscribers check the table within seconds.
    pub fn leave_gap(&self, reason: &str) {
        match &self.0 {
            Told::Nowhere => {}
            Told::InProcess(sender) => {
                // Without a receiver, nobody has to check.
                let _ = sender.send(Arc::new(Notice::Missed(reason.to_owned())));
            }
            // The sender announces a gap that no message follows.
            Told::Rabbit { numbers, .. } => *numbers.lock() += 1,
        }
    }

    /// Whether what is told goes out; `None` if nothing stands in between.
    #[must_use]
    pub fn status(&self) -> Option<watch::Receiver<LinkStatus>> {
        match &self.0 {
            Told::Rabbit { status, .. } => Some(status.clone()),
            Told::Nowhere | Told::InProcess(_) => None,
        }
    }

    /// Returns only if what sends has died: nothing would be told any more, and nobody would know.
    pub async fn died(&self) {
        match &self.0 {
            Told::Rabbit { outbox, .. } => outbox.closed().await,
            Told::Nowhere | Told::InProcess(_) => std::future::pending().await,
        }
    }

    /// Lets what waits go out, for a moment, if it can and every other clone is dropped.
    pub async fn close(self) {
        let Told::Rabbit { outbox, mut status, .. } = self.0 else { return };
        drop(outbox);
        let ended = async { while status.changed().await.is_ok() {} };
        if timeout(CLOSE_TIMEOUT, ended).await.is_err() {
            tracing::debug!("the broker does not take the last events");
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn a_death_of_what_sends_is_noticed_and_while_it_lives_there_is_none() {
        let (outbox, waiting) = mpsc::channel(1);
        let (_, status) = watch::channel(Ok(()));
        let emitter = Emitter(Told::Rabbit { outbox, numbers: Numbers::default(), status });
        assert!(emitter.died().now_or_never().is_none());
        drop(waiting);
        assert!(emitter.died().now_or_never().is_some());
        let nowhere = Emitter::start(&Exchange::nowhere(), "test");
        assert!(nowhere.died().now_or_never().is_none());
    }
}
