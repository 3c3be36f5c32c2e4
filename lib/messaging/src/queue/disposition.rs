//! The ways to settle a delivery, and the outcome.

use std::time::Duration;

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
        /// The delay is at least this long, because the status API requested it.
        after: Option<Duration>,
    },
    /// No attempt was made, or its failure does not concern this message. The message goes to the
    /// end of the queue unchanged. A requeue counts neither as an attempt nor towards the broker's
    /// delivery limit.
    Requeue,
    /// The message is given up and becomes a dead letter.
    DeadLetter {
        /// Why the message is given up, for logs and dead letters.
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
