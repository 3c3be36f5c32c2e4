//! Histograms with fixed buckets.

use std::sync::atomic::Ordering;

use metrics::atomics::AtomicU64;
use metrics::{GaugeFn as _, HistogramFn};

/// Upper bounds of a `_seconds` histogram: from a fast commit to a very slow status API.
const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
/// Upper bounds of the time from a callback to the commit, which after an outage may be hours.
const SECONDS_TO_COMMIT: [f64; 14] =
    [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0, 86_400.0];
/// Upper bounds of a `_rows` histogram.
const ROWS: [f64; 8] = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 10_000.0];

/// Counts values by bucket. Recording takes no lock.
pub(super) struct Histogram {
    bounds: &'static [f64],
    /// For each bound, the number of values up to it and above the previous bound; finally, the
    /// number of values above all bounds.
    counts: Box<[AtomicU64]>,
    /// The bits of an `f64`, as in a gauge.
    sum: AtomicU64,
}

impl Histogram {
    /// An empty histogram with the buckets that the suffix of its name selects.
    pub(super) fn new(name: &str) -> Self {
        let bounds: &[f64] = if name.ends_with("_to_commit_seconds") {
            &SECONDS_TO_COMMIT
        } else if name.ends_with("_rows") {
            &ROWS
        } else {
            &SECONDS
        };
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0) }
    }

    /// The upper bound of each bucket with the number of values up to it. The last bound is
    /// infinite, so its number is that of all values.
    pub(super) fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        bounds.zip(&self.counts).scan(0, |total, (bound, count)| {
            *total += count.load(Ordering::Relaxed);
            Some((bound, *total))
        })
    }

    pub(super) fn sum(&self) -> f64 {
        f64::from_bits(self.sum.load(Ordering::Relaxed))
    }
}

impl HistogramFn for Histogram {
    fn record(&self, value: f64) {
        let bucket = self.bounds.iter().position(|bound| value <= *bound);
        self.counts[bucket.unwrap_or(self.bounds.len())].fetch_add(1, Ordering::Relaxed);
        self.sum.increment(value);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn each_bucket_counts_all_values_up_to_its_bound() {
        let histogram = Histogram::new("batch_rows");
        for value in [0.0, 1.0, 1.5, 10_000.0, 10_000.5] {
            histogram.record(value);
        }
        let counts: Vec<u64> = histogram.buckets().map(|(_, count)| count).collect();
        assert_eq!(counts, [2, 3, 3, 3, 3, 3, 3, 4, 5]);
        assert_eq!(histogram.sum().to_string(), "20003");
    }

    #[test]
    fn value_that_is_not_a_number_is_above_all_bounds() {
        let histogram = Histogram::new("batch_rows");
        histogram.record(f64::NAN);
        let counts: Vec<u64> = histogram.buckets().map(|(_, count)| count).collect();
        assert_eq!(counts, [0, 0, 0, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn suffix_of_the_name_selects_the_buckets() {
        let first_bound = |name| Histogram::new(name).buckets().next().unwrap().0.to_string();
        assert_eq!(first_bound("lookup_seconds"), "0.001");
        assert_eq!(first_bound("callback_to_commit_seconds"), "0.05");
        assert_eq!(first_bound("batch_rows"), "1");
    }

    #[test]
    fn no_value_is_lost_when_threads_record_at_once() {
        let (histogram, start) = (Histogram::new("batch_rows"), Barrier::new(4));
        std::thread::scope(|scope| {
            for value in [2.0, 20.0, 200.0, 2_000.0] {
                let (histogram, start) = (&histogram, &start);
                scope.spawn(move || {
                    start.wait();
                    (0..500_000).for_each(|_| histogram.record(value));
                });
            }
        });
        assert_eq!(histogram.buckets().last(), Some((f64::INFINITY, 2_000_000)));
        assert_eq!(histogram.sum().to_string(), "1111000000");
    }
}
