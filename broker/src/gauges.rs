//! The queue in metrics: how much lies there, and for how long.

use std::time::SystemTime;

use metrics::Gauge;

use crate::Depths;

/// What a consumer tells of the queue. Several tell the same, up to the moment of their look.
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
            "Messages that are ready and that no consumer has taken."
        );
        metrics::describe_gauge!(
            "lastseen_unsettled_messages",
            "Messages that this consumer has taken and not settled."
        );
        metrics::describe_gauge!(
            "lastseen_delayed_messages",
            "Messages that have failed and wait to be tried again."
        );
        metrics::describe_gauge!("lastseen_dead_letters", "Messages that were given up.");
        metrics::describe_gauge!(
            "lastseen_oldest_message_age_seconds",
            metrics::Unit::Seconds,
            "Time since the callback of the oldest message that is ready or that this consumer has \
             taken; 0 if there is none."
        );
        Self {
            ready: metrics::gauge!("lastseen_queue_messages"),
            unsettled: metrics::gauge!("lastseen_unsettled_messages"),
            delayed: metrics::gauge!("lastseen_delayed_messages"),
            dead: metrics::gauge!("lastseen_dead_letters"),
            oldest_age: metrics::gauge!("lastseen_oldest_message_age_seconds"),
        }
    }

    /// Tells what a look has found, with the moment of the callback of the oldest message.
    pub(crate) fn set(&self, depths: Depths, unsettled: usize, oldest: Option<SystemTime>) {
        self.ready.set(as_float(depths.ready));
        self.unsettled.set(as_float(unsettled as u64));
        self.delayed.set(as_float(depths.delayed));
        self.dead.set(as_float(depths.dead));
        // The producer's clock may be ahead of ours.
        let age = oldest.and_then(|since| since.elapsed().ok()).unwrap_or_default();
        self.oldest_age.set(age.as_secs_f64());
    }
}

#[expect(clippy::cast_precision_loss, reason = "nobody counts beyond 2^52 messages")]
fn as_float(count: u64) -> f64 {
    count as f64
}
