//! Turns the metrics of all services into one set of figures.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use metrics::{Key, Label};
use serde::Serialize;
use utoipa::ToSchema;

use super::text_format;

/// A service, and whether its metrics can be read.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ServiceStatus {
    /// The URL of its metrics; `this process` for the roles of `lastseen`.
    pub(super) url: String,
    /// `ok`, or why its metrics cannot be read.
    pub(super) status: String,
    /// The problem with its settings file; null if there is none, or if it is unknown.
    pub(super) settings: Option<String>,
}

/// Metrics of all services together; null if no service reports the metric.
#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub(crate) struct PipelineMetrics {
    /// Each service whose metrics the viewer reads.
    pub(super) services: Vec<ServiceStatus>,
    /// Callbacks answered per second, with any status.
    callbacks_per_second: Option<f64>,
    /// Ids in accepted callbacks per second.
    ids_per_second: Option<f64>,
    /// Lookups ended per second.
    lookups_per_second: Option<f64>,
    /// Lookups started but not yet answered.
    pub(super) lookups_in_flight: Option<f64>,
    /// Lookups ended per second, by outcome.
    lookups_by_outcome: Option<BTreeMap<String, f64>>,
    /// Messages in the queue that are not delivered to a consumer.
    queue_messages: Option<f64>,
    /// Messages that the system gave up on, kept for a person.
    dead_letters: Option<f64>,
    /// Age of the oldest message in the queue.
    oldest_message_age_seconds: Option<f64>,
    /// Messages in the spools of the producers, which the broker has not confirmed.
    spool_messages: Option<f64>,
    /// State of the circuit breaker around the status API: 0 closed, 1 half-open, 2 paused because
    /// the API asked for it, 3 open (probes only).
    breaker_state: Option<f64>,
}

/// The samples of one replica, by name and labels.
#[derive(Clone)]
pub(super) struct Scrape {
    samples: HashMap<Key, f64>,
    at: Instant,
}

/// Aggregates the scrapes of all replicas, each with its previous scrape if there is one.
pub(super) fn aggregate(
    services: Vec<ServiceStatus>,
    scrapes: &[(Option<Scrape>, Scrape)],
) -> PipelineMetrics {
    let sum = |name| gauges(scrapes, name).reduce(|one, other| one + other);
    // All replicas report the same queue, so their values must not be added.
    let max = |name| gauges(scrapes, name).reduce(f64::max);
    let rate = |name| rates(scrapes, name).map(|rates| rates.into_values().sum());
    PipelineMetrics {
        services,
        callbacks_per_second: rate("lastseen_callbacks_total"),
        ids_per_second: rate("lastseen_callback_ids_total"),
        lookups_per_second: rate("lastseen_lookups_total"),
        lookups_in_flight: sum("lastseen_lookups_in_flight"),
        lookups_by_outcome: rates(scrapes, "lastseen_lookups_total"),
        queue_messages: max("lastseen_queue_messages"),
        dead_letters: max("lastseen_dead_letters"),
        oldest_message_age_seconds: max("lastseen_oldest_message_age_seconds"),
        spool_messages: sum("lastseen_spool_messages"),
        breaker_state: max("lastseen_breaker_state"),
    }
}

fn gauges(scrapes: &[(Option<Scrape>, Scrape)], name: &'static str) -> impl Iterator<Item = f64> {
    scrapes.iter().flat_map(move |(_, now)| now.of(name)).map(|(_, value)| value)
}

/// The growth of a counter per second, by its label `outcome`; `None` if no replica with an earlier
/// scrape reports the counter.
fn rates(
    scrapes: &[(Option<Scrape>, Scrape)],
    name: &'static str,
) -> Option<BTreeMap<String, f64>> {
    let mut rates = BTreeMap::new();
    for (previous, now) in scrapes {
        let Some(previous) = previous else { continue };
        let seconds = now.at.duration_since(previous.at).as_secs_f64();
        for (key, value) in now.of(name) {
            // A new counter, or one of a restarted process, has counted from 0.
            let previous_value = previous.samples.get(key).filter(|previous| **previous <= value);
            let growth = value - previous_value.copied().unwrap_or(0.0);
            let label = key.labels().find(|label| label.key() == "outcome");
            let outcome = label.map_or("", Label::value).to_owned();
            *rates.entry(outcome).or_default() += growth / seconds.max(0.001);
        }
    }
    (!rates.is_empty()).then_some(rates)
}

impl Scrape {
    /// The samples in a response of `/metrics`.
    pub(super) fn of_text(text: &str) -> Self {
        Self { samples: text_format::samples(text), at: Instant::now() }
    }

    pub(super) fn of_this_process() -> Self {
        Self { samples: runtime::metric_values().into_iter().collect(), at: Instant::now() }
    }

    /// The problem with this process's settings file, if it reports one.
    pub(super) fn settings_problem(&self) -> Option<String> {
        let of = |name| self.of(name).map(|(_, value)| value).sum::<f64>();
        if of("lastseen_settings_refused") > 0.0 {
            let rejected =
                "the file was rejected and the old settings apply; see the service's log";
            return Some(rejected.to_owned());
        }
        let awaiting = of("lastseen_settings_awaiting_restart");
        (awaiting > 0.0).then(|| format!("changed settings that need a restart: {awaiting}"))
    }

    /// The samples of one metric, with any labels.
    fn of(&self, name: &'static str) -> impl Iterator<Item = (&Key, f64)> {
        let samples = self.samples.iter().filter(move |(key, _)| key.name() == name);
        samples.map(|(key, value)| (key, *value))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn scrape(text: &str, at: Instant) -> Scrape {
        Scrape { at, ..Scrape::of_text(text) }
    }

    #[test]
    fn rejected_or_pending_settings_file_is_reported() {
        let problem = |text| scrape(text, Instant::now()).settings_problem();
        let fine = "lastseen_settings_refused 0\nlastseen_settings_awaiting_restart 0";
        assert_eq!(problem(fine), None);
        assert_eq!(problem(""), None);
        let rejected = "lastseen_settings_refused 1\nlastseen_settings_awaiting_restart 2";
        assert!(problem(rejected).unwrap().contains("rejected"));
        let pending = problem("lastseen_settings_awaiting_restart 2").unwrap();
        assert!(pending.contains("a restart: 2"), "{pending}");
    }

    #[test]
    fn counters_become_rates_and_gauges_are_aggregated() {
        let start = Instant::now();
        let later = start + Duration::from_secs(2);
        let before = "lastseen_lookups_total{outcome=\"online\"} 100\nlastseen_lookups_in_flight 1";
        let now = "# HELP lastseen_lookups_total 7\n\
                   lastseen_lookups_total{outcome=\"online\"} 110\n\
                   lastseen_lookups_total{outcome=\"timeout\"} 4\n\
                   lastseen_lookups_total_others 1000\n\
                   lastseen_lookups_in_flight 3\nlastseen_dead_letters 5";
        // A process that has restarted, so its counter is smaller.
        let restarted = "lastseen_lookups_total{outcome=\"online\"} 6\n\
                     lastseen_lookups_in_flight 4\nlastseen_dead_letters 5";
        let scrapes = [
            (Some(scrape(before, start)), scrape(now, later)),
            (Some(scrape(before, start)), scrape(restarted, later)),
            (None, scrape(now, later)),
        ];
        let metrics = aggregate(Vec::new(), &scrapes);
        let by_outcome = metrics.lookups_by_outcome.unwrap();
        // In two seconds, the counters grew by 10, and by 6 after the restart.
        assert_eq!(by_outcome["online"].to_string(), "8");
        assert_eq!(by_outcome["timeout"].to_string(), "2");
        assert_eq!(metrics.lookups_per_second.map(|rate| rate.to_string()), Some("10".to_owned()));
        assert_eq!(metrics.lookups_in_flight.map(|count| count.to_string()), Some("10".to_owned()));
        assert_eq!(metrics.dead_letters.map(|count| count.to_string()), Some("5".to_owned()));
        assert!(metrics.callbacks_per_second.is_none() && metrics.queue_messages.is_none());
    }
}
