//! Metrics of the queue: its depths, and the age of its oldest message.

use std::time::SystemTime;

use metrics::Gauge;

/// The number of messages in the queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depths {
    /// Ready to be delivered. For a queue in a file, this includes messages in flight.
    pub ready: u64,
    /// Waiting for the next attempt.
    pub delayed: u64,
    /// Dead letters.
    pub dead: u64,
}

/// The gauges that a consumer sets. All consumers of a queue report the same depths, each as of its
/// own last inspection.
pub(crate) struct Gauges {
    ready: Gauge,
    unsettled: Gauge,
    delayed: Gauge,
    dead: Gauge,
    oldest_age: Gauge,
}

impl Gauges {
    pub(crate) fn new() -> Self {
        metrics::describe_gauge!(
            "lastseen_queue_messages",
            "Messages that are ready and have not been delivered to a consumer."
        );
        metrics::describe_gauge!(
            "lastseen_unsettled_messages",
            "Messages that were delivered to this consumer and are not settled."
        );
        metrics::describe_gauge!(
            "lastseen_delayed_messages",
            "Messages that wait in a delay queue for their next attempt."
        );
        metrics::describe_gauge!(
            "lastseen_dead_letters",
            "Messages that were given up and are kept for a person."
        );
        metrics::describe_gauge!(
            "lastseen_oldest_message_age_seconds",
            metrics::Unit::Seconds,
            "Age of the oldest callback whose message is ready or unsettled at this consumer; 0 if \
             there is none."
        );
        Self {
            ready: metrics::gauge!("lastseen_queue_messages"),
            unsettled: metrics::gauge!("lastseen_unsettled_messages"),
            delayed: metrics::gauge!("lastseen_delayed_messages"),
            dead: metrics::gauge!("lastseen_dead_letters"),
            oldest_age: metrics::gauge!("lastseen_oldest_message_age_seconds"),
        }
    }

    /// Sets all gauges. `oldest` is when the callback of the oldest message arrived.
    pub(crate) fn set(&self, depths: Depths, unsettled: usize, oldest: Option<SystemTime>) {
        self.ready.set(as_float(depths.ready));
        self.unsettled.set(as_float(unsettled as u64));
        self.delayed.set(as_float(depths.delayed));
        self.dead.set(as_float(depths.dead));
        // The producer's clock may be ahead of this one.
        let age = oldest.and_then(|since| since.elapsed().ok()).unwrap_or_default();
        self.oldest_age.set(age.as_secs_f64());
    }
}

#[expect(clippy::cast_precision_loss, reason = "a queue never holds 2^52 messages")]
fn as_float(count: u64) -> f64 {
    count as f64
}
