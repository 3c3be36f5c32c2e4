//! Whether callbacks try the broker first, or go to the spool at once.

use std::sync::atomic::{AtomicBool, Ordering};

use messaging::queue::PublishError;

/// What the broker has done with a callback's messages so far.
#[derive(Debug)]
pub(crate) enum BrokerOutcome {
    /// The messages were not sent, because the broker was unavailable.
    NotTried,
    /// The broker has confirmed all messages.
    Confirmed,
    /// The broker has not responded within its share of the time, but may still confirm the
    /// messages.
    Late,
    /// The broker has not confirmed all messages, and will not.
    Failed(PublishError),
}

impl From<Result<(), PublishError>> for BrokerOutcome {
    fn from(published: Result<(), PublishError>) -> Self {
        published.map_or_else(Self::Failed, |()| Self::Confirmed)
    }
}

// Decision: docs/decisions/0006-how-does-the-producer-know-that-the-broker-accepts.md
/// Whether the broker confirms messages in time, by the most recent outcome.
///
/// The flag cannot stay cleared once the broker works again. The next callback either goes to the
/// spool, from which the relay publishes its messages, or tries the broker because there is no
/// spool. Either way, a confirm in time sets the flag.
#[derive(Debug)]
pub(crate) struct BrokerAvailability(AtomicBool);

impl BrokerAvailability {
    pub(crate) fn new() -> Self {
        Self(AtomicBool::new(true))
    }

    pub(crate) fn is_available(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, is_available: bool) {
        self.0.store(is_available, Ordering::Relaxed);
    }

    pub(crate) fn update(&self, outcome: &BrokerOutcome) {
        match outcome {
            // `Full` is a limit of the publisher: the broker itself may confirm in time.
            BrokerOutcome::NotTried | BrokerOutcome::Failed(PublishError::Full(_)) => {}
            BrokerOutcome::Confirmed => self.set(true),
            BrokerOutcome::Late | BrokerOutcome::Failed(_) => self.set(false),
        }
    }
}
