//! A delivery.

use std::time::SystemTime;

use crate::queue::disposition::{Disposition, Settled};
use crate::queue::message::DecodeError;
use crate::queue::{amqp, sqlite};

/// A message that was received from the queue and is not settled. Dropping a delivery does not
/// settle it: the broker redelivers the message when the consumer is closed.
pub struct Delivery(pub(crate) Inner);

pub(crate) enum Inner {
    Amqp(Box<amqp::Delivery>),
    Sqlite(sqlite::Delivery),
}

/// The properties of a delivery that all backends have in common.
pub(crate) struct Details {
    pub(crate) id: Result<i64, DecodeError>,
    pub(crate) callback_id: String,
    pub(crate) traceparent: Option<String>,
    pub(crate) accepted_at: Option<SystemTime>,
    pub(crate) failed_attempts: u32,
    pub(crate) redelivered: bool,
}

impl Delivery {
    fn details(&self) -> &Details {
        match &self.0 {
            Inner::Amqp(delivery) => &delivery.details,
            Inner::Sqlite(delivery) => &delivery.details,
        }
    }

    /// The object to look up.
    ///
    /// # Errors
    /// [`DecodeError`] if the message contains no id. Such a message must become a dead letter.
    pub fn id(&self) -> Result<i64, &DecodeError> {
        self.details().id.as_ref().copied()
    }

    /// The callback that named the object; empty for a message of the Go producer.
    #[must_use]
    pub fn callback_id(&self) -> &str {
        &self.details().callback_id
    }

    /// The span that published the message (W3C Trace Context), if the message contains it.
    #[must_use]
    pub fn traceparent(&self) -> Option<&str> {
        self.details().traceparent.as_deref()
    }

    /// When the callback arrived, by the producer's clock; `None` if the message does not contain
    /// the time.
    #[must_use]
    pub fn accepted_at(&self) -> Option<SystemTime> {
        self.details().accepted_at
    }

    /// The number of failed attempts at this message.
    #[must_use]
    pub fn failed_attempts(&self) -> u32 {
        self.details().failed_attempts
    }

    /// Whether the message may have been delivered before, to a consumer that did not settle it.
    #[must_use]
    pub fn redelivered(&self) -> bool {
        self.details().redelivered
    }

    /// Whether the delivery's channel is closed. A lost delivery cannot be settled, and the broker
    /// delivers its message again.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        match &self.0 {
            Inner::Amqp(delivery) => delivery.is_lost(),
            // A file has no channel that could be lost.
            Inner::Sqlite(_) => false,
        }
    }

    /// Settles the delivery. A requeue, a retry and a dead letter each make a copy, which is
    /// durable before the original is removed: for a moment there may be two messages, never none.
    /// If the broker does not confirm the copy, this publishes another copy, for as long as the
    /// delivery's channel is open. If this future is dropped, either the delivery is settled or the
    /// message is delivered again when the consumer is closed.
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
