//! A message as received, and the ways to settle it.

use std::time::{Duration, SystemTime};

use crate::message::DecodeError;
use crate::{amqp, sqlite};

/// How a delivery is settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// It has had its effect.
    Ack,
    /// The attempt failed; it comes back after a wait that grows with the attempts.
    Retry {
        /// Why, for the logs and for the person who may find it among the dead letters.
        reason: String,
        /// The least wait that the peer asked for.
        after: Option<Duration>,
    },
    /// No attempt was made, or it says nothing about the message: it goes to the end of the queue as it
    /// is, and counts neither as an attempt nor as a redelivery, of which the broker allows only some.
    Requeue,
    /// Given up, kept for a person among the dead letters.
    DeadLetter {
        /// Why, as above.
        reason: String,
    },
}

/// Whether the settlement reached the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The broker will not deliver the message again.
    Done,
    /// The channel it came by is gone: the broker delivers the message again.
    Lost,
}

/// A message in flight: taken from the queue and not settled. Dropping it settles nothing; the
/// broker redelivers it when its consumer is closed.
pub struct Delivery(pub(crate) Inner);

pub(crate) enum Inner {
    Amqp(Box<amqp::Delivery>),
    Sqlite(sqlite::Delivery),
}

impl Delivery {
    /// The object to look up.
    ///
    /// # Errors
    /// [`DecodeError`] when the message names none; it belongs among the dead letters.
    pub fn id(&self) -> Result<i64, &DecodeError> {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.id(),
            Inner::Sqlite(delivery) => Ok(delivery.id()),
        }
    }

    /// The callback that named the object; empty for a message of the Go producer.
    #[must_use]
    pub fn callback_id(&self) -> &str {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.callback_id(),
            Inner::Sqlite(delivery) => delivery.callback_id(),
        }
    }

    /// The span that it was published in (W3C Trace Context), if the message tells.
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.traceparent(),
            Inner::Sqlite(delivery) => delivery.traceparent(),
        }
    }

    /// When the callback came in, by the clock of the producer that took it; `None` for a message that
    /// does not tell.
    #[must_use]
    pub fn accepted_at(&self) -> Option<SystemTime> {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.accepted_at(),
            Inner::Sqlite(delivery) => delivery.accepted_at(),
        }
    }

    /// How many attempts at this message have failed before.
    #[must_use]
    pub fn failed_attempts(&self) -> u32 {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.failed_attempts(),
            Inner::Sqlite(delivery) => delivery.failed_attempts(),
        }
    }

    /// Whether it may have been delivered before, to a consumer that went away with it.
    #[must_use]
    pub fn redelivered(&self) -> bool {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.redelivered(),
            Inner::Sqlite(delivery) => delivery.redelivered(),
        }
    }

    /// Whether the channel that it came by is gone: then it cannot be settled, and is delivered again.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.is_lost(),
            // A file is not lost without its process.
            Inner::Sqlite(_) => false,
        }
    }

    /// Settles it. A requeued one, a retry or a dead letter is durable before the original is gone: between the two
    /// there may be two of them, never none. While the broker does not confirm, it is tried again
    /// for as long as the delivery's own channel lasts. If this is dropped, the message is settled all
    /// the same, or delivered again when its consumer is closed.
    pub async fn settle(self, disposition: Disposition) -> Settled {
        let kind = match &disposition {
            Disposition::Ack => "ack",
            Disposition::Retry { .. } => "retry",
            Disposition::Requeue => "requeue",
            Disposition::DeadLetter { .. } => "dead_letter",
        };
        let settled = match self.0 {
            Inner::Amqp(delivery) => delivery.settle(disposition).await,
            Inner::Sqlite(delivery) => delivery.settle(disposition).await,
        };
        let label = if settled == Settled::Lost { "lost" } else { kind };
        metrics::counter!("lastseen_settled_total", "disposition" => label).increment(1);
        settled
    }

    /// Gives it back at once, as if it had not been delivered, so that another consumer can have it.
    pub async fn give_back(self) {
        match self.0 {
            Inner::Amqp(delivery) => delivery.give_back().await,
            Inner::Sqlite(delivery) => delivery.give_back(),
        }
    }
}
