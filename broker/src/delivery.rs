//! A delivery and the ways to settle it.

use std::time::{Duration, SystemTime};

use crate::message::DecodeError;
use crate::{amqp, sqlite};

/// How a delivery is settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// The delivery has had its effect.
    Ack,
    /// The attempt failed. The message is delivered again after a delay that grows with the
    /// attempts.
    Retry {
        /// Why the attempt failed, for logs and dead letters.
        reason: String,
        /// The shortest delay that the status API requested.
        after: Option<Duration>,
    },
    /// No attempt was made, or its failure does not concern this message. The message goes to the
    /// end of the queue unchanged. This counts neither as an attempt nor towards the broker's
    /// delivery limit.
    Requeue,
    /// The message is given up and becomes a dead letter.
    DeadLetter {
        /// Why the attempt failed, for logs and dead letters.
        reason: String,
    },
}

/// The outcome of settling a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The broker will not deliver the message again.
    Done,
    /// The delivery's channel is closed, so the broker delivers the message again.
    Lost,
}

/// A message that was received from the queue and is not settled. Dropping it does not settle it:
/// the broker redelivers the message when the consumer is closed.
pub struct Delivery(pub(crate) Inner);

pub(crate) enum Inner {
    Amqp(Box<amqp::Delivery>),
    Sqlite(sqlite::Delivery),
}

impl Delivery {
    /// The object to look up.
    ///
    /// # Errors
    /// [`DecodeError`] if the message contains no id. Such a message must become a dead letter.
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

    /// The span that published the message (W3C Trace Context), if the message contains it.
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.traceparent(),
            Inner::Sqlite(delivery) => delivery.traceparent(),
        }
    }

    /// When the callback arrived, by the producer's clock; `None` if the message does not contain
    /// it.
    #[must_use]
    pub fn accepted_at(&self) -> Option<SystemTime> {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.accepted_at(),
            Inner::Sqlite(delivery) => delivery.accepted_at(),
        }
    }

    /// The number of failed attempts at this message.
    #[must_use]
    pub fn failed_attempts(&self) -> u32 {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.failed_attempts(),
            Inner::Sqlite(delivery) => delivery.failed_attempts(),
        }
    }

    /// Whether the message may have been delivered before, to a consumer that did not settle it.
    #[must_use]
    pub fn redelivered(&self) -> bool {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.redelivered(),
            Inner::Sqlite(delivery) => delivery.redelivered(),
        }
    }

    /// Whether the delivery's channel is closed: then it cannot be settled, and the message is
    /// delivered again.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.is_lost(),
            // A file has no channel that could be lost.
            Inner::Sqlite(_) => false,
        }
    }

    /// Settles the delivery. The copy of a requeue, retry or dead letter is durable before the
    /// original is removed: for a moment there may be two messages, never none. If the broker does
    /// not confirm the copy, it is published again for as long as the delivery's channel is open.
    /// If this future is dropped, the delivery may be settled, or the message is delivered again
    /// when the consumer is closed.
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

    /// Gives the message back to the queue at once, as if it had not been delivered, for other
    /// consumers.
    pub async fn give_back(self) {
        match self.0 {
            Inner::Amqp(delivery) => delivery.give_back().await,
            Inner::Sqlite(delivery) => delivery.give_back(),
        }
    }
}
