//! The metrics of lookups. Their handles are kept, because finding a metric by its name and labels
//! for each lookup costs several times as much as recording a value.

use std::time::{Instant, SystemTime};

use metrics::{Counter, Gauge, Histogram, Unit};

use crate::status_api::{Answer, LookupError, NOT_FOUND_METRIC};

pub(super) struct LookupMetrics {
    in_flight: Gauge,
    seconds: Histogram,
    seconds_to_commit: Histogram,
    online: Counter,
    offline: Counter,
}

impl LookupMetrics {
    /// Describes the metrics, and reports those that no lookup has changed yet as 0.
    pub(super) fn register() -> Self {
        metrics::describe_counter!("lastseen_lookups_total", "Lookups by outcome.");
        for failure in LookupError::LABELS {
            lookups_by_outcome(failure).increment(0);
        }
        metrics::describe_counter!(
            NOT_FOUND_METRIC,
            "Lookups answered with 404, whether it means offline or is a failed lookup."
        );
        metrics::counter!(NOT_FOUND_METRIC).increment(0);
        metrics::describe_histogram!(
            "lastseen_callback_to_commit_seconds",
            Unit::Seconds,
            "Time from the callback to the commit of an online object, for each message."
        );
        metrics::describe_gauge!("lastseen_lookups_in_flight", "Lookups in flight.");
        metrics::gauge!("lastseen_lookups_in_flight").set(0);
        metrics::describe_histogram!(
            "lastseen_lookup_seconds",
            Unit::Seconds,
            "Duration of a lookup, regardless of its outcome."
        );
        Self {
            in_flight: metrics::gauge!("lastseen_lookups_in_flight"),
            seconds: metrics::histogram!("lastseen_lookup_seconds"),
            seconds_to_commit: metrics::histogram!("lastseen_callback_to_commit_seconds"),
            online: lookups_by_outcome("online"),
            offline: lookups_by_outcome("offline"),
        }
    }

    /// Returns the start, for [`Self::finish_lookup`].
    pub(super) fn start_lookup(&self) -> Instant {
        self.in_flight.increment(1.0);
        Instant::now()
    }

    pub(super) fn finish_lookup(&self, started: Instant, answer: &Result<Answer, LookupError>) {
        self.in_flight.decrement(1.0);
        self.seconds.record(started.elapsed());
        match answer {
            Ok(Answer::Online(_)) => self.online.increment(1),
            Ok(Answer::Offline) => self.offline.increment(1),
            Err(error) => lookups_by_outcome(error.label()).increment(1),
        }
    }

    /// Records the time from the callbacks, accepted at these times, to the commit.
    pub(super) fn record_commit(&self, accepted: impl Iterator<Item = SystemTime>) {
        for accepted_at in accepted {
            // The producer's clock may be ahead of this machine's.
            self.seconds_to_commit.record(accepted_at.elapsed().unwrap_or_default());
        }
    }
}

fn lookups_by_outcome(outcome: &'static str) -> Counter {
    metrics::counter!("lastseen_lookups_total", "outcome" => outcome)
}
