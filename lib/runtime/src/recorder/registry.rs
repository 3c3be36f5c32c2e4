//! The values and descriptions of all metrics that were recorded through the `metrics` facade.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use metrics::atomics::AtomicU64;
use metrics::{Counter, Gauge, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use parking_lot::RwLock;

use super::histogram::Histogram;

/// The metrics of a process, by name and labels.
pub(crate) struct Registry {
    counters: Metrics<AtomicU64>,
    /// The bits of `f64` values, as the facade's `GaugeFn` stores them.
    gauges: Metrics<AtomicU64>,
    histograms: Metrics<Histogram>,
    descriptions: RwLock<BTreeMap<KeyName, SharedString>>,
}

/// The current value of a metric.
pub(super) enum Value<'a> {
    Counter(u64),
    Gauge(f64),
    Histogram(&'a Histogram),
}

impl Registry {
    pub(super) const fn new() -> Self {
        Self {
            counters: Metrics::new(),
            gauges: Metrics::new(),
            histograms: Metrics::new(),
            descriptions: RwLock::new(BTreeMap::new()),
        }
    }

    /// Visits all metrics, in any order. `visit` must not use a metric that may be new, because it
    /// would wait for itself.
    pub(super) fn visit(&self, mut visit: impl FnMut(&Key, Value<'_>)) {
        for (key, counter) in &*self.counters.0.read() {
            visit(key, Value::Counter(counter.load(Ordering::Relaxed)));
        }
        for (key, gauge) in &*self.gauges.0.read() {
            visit(key, Value::Gauge(f64::from_bits(gauge.load(Ordering::Relaxed))));
        }
        for (key, histogram) in &*self.histograms.0.read() {
            visit(key, Value::Histogram(histogram));
        }
    }

    pub(super) fn description(&self, name: &str) -> Option<SharedString> {
        self.descriptions.read().get(name).cloned()
    }

    fn describe(&self, name: KeyName, description: SharedString) {
        self.descriptions.write().entry(name).or_insert(description);
    }
}

impl Value<'_> {
    /// The value of a counter or gauge; `None` for a histogram.
    pub(super) fn as_number(&self) -> Option<f64> {
        match self {
            #[expect(clippy::cast_precision_loss, reason = "exact up to 2^53")]
            Self::Counter(count) => Some(*count as f64),
            Self::Gauge(value) => Some(*value),
            Self::Histogram(_) => None,
        }
    }
}

/// Names contain their unit, so the unit of a description is not stored.
impl Recorder for Registry {
    fn describe_counter(&self, name: KeyName, _: Option<Unit>, description: SharedString) {
        self.describe(name, description);
    }

    fn describe_gauge(&self, name: KeyName, _: Option<Unit>, description: SharedString) {
        self.describe(name, description);
    }

    fn describe_histogram(&self, name: KeyName, _: Option<Unit>, description: SharedString) {
        self.describe(name, description);
    }

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.counters.get_or_insert(key, AtomicU64::default))
    }

    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(self.gauges.get_or_insert(key, AtomicU64::default))
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> metrics::Histogram {
        let histogram = self.histograms.get_or_insert(key, || Histogram::new(key.name()));
        metrics::Histogram::from_arc(histogram)
    }
}

/// All metrics of one kind.
struct Metrics<T>(RwLock<HashMap<Key, Arc<T>, BuildHasherDefault<PrecomputedHash>>>);

impl<T> Metrics<T> {
    const fn new() -> Self {
        Self(RwLock::new(HashMap::with_hasher(BuildHasherDefault::new())))
    }

    /// Every use of a macro such as `counter!` calls this, so it must be cheap for a known key.
    fn get_or_insert(&self, key: &Key, new: impl FnOnce() -> T) -> Arc<T> {
        if let Some(metric) = self.0.read().get(key) {
            return Arc::clone(metric);
        }
        self.insert(key, new)
    }

    /// Keeps the metric that another thread may have inserted since.
    fn insert(&self, key: &Key, new: impl FnOnce() -> T) -> Arc<T> {
        let mut metrics = self.0.write();
        Arc::clone(metrics.entry(key.to_retained()).or_insert_with(|| Arc::new(new())))
    }
}

/// Returns the hash that a [`Key`] contains and writes by `write_u64`.
#[derive(Default)]
struct PrecomputedHash(u64);

impl Hasher for PrecomputedHash {
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    /// Not called for a [`Key`]. It would still be correct if a later version of the facade did so.
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn no_increment_is_lost_when_threads_use_new_metrics_at_once() {
        let (registry, start) = (Registry::new(), Barrier::new(4));
        let record = || {
            start.wait();
            for round in 0..10_000 {
                metrics::counter!("seen_total", "round" => round.to_string()).increment(1);
                metrics::gauge!("waiting").increment(2);
                metrics::gauge!("waiting").decrement(1);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| metrics::with_local_recorder(&registry, record));
            }
        });
        registry.visit(|key, value| match value {
            Value::Counter(count) => assert_eq!(count, 4, "{key}"),
            Value::Gauge(value) => assert_eq!(value.to_string(), "40000"),
            Value::Histogram(_) => panic!("{key}"),
        });
    }

    #[test]
    fn second_insertion_returns_the_first_metric() {
        let (metrics, key) = (Metrics::new(), Key::from_name("seen_total"));
        let [first, second] = [1, 2].map(|value| metrics.insert(&key, || value));
        assert_eq!((*first, *second), (1, 1));
    }

    #[test]
    fn order_of_labels_does_not_matter() {
        let registry = Registry::new();
        metrics::with_local_recorder(&registry, || {
            metrics::counter!("seen_total", "kind" => "a", "file" => "b").increment(1);
            metrics::counter!("seen_total", "file" => "b", "kind" => "a").increment(1);
            metrics::counter!("seen_total", "kind" => "b", "file" => "a").increment(1);
        });
        let mut numbers = Vec::new();
        registry.visit(|_, value| numbers.push(value.as_number().unwrap_or_default().to_string()));
        numbers.sort_unstable();
        assert_eq!(numbers, ["1", "2"]);
    }
}
