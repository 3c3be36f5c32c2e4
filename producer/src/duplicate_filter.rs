//! Recognises repeats of signed callbacks, so that each callback is published once.
//!
//! The filter saves work but guarantees nothing: other producers do not know these callbacks, and a
//! restart forgets them. Consumers must expect that a message is published more than once.
//!
//! Decision: docs/decisions/0012-when-are-two-callbacks-the-same.md

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use parking_lot::Mutex;
use runtime::authenticity::Fingerprint;
use tokio::sync::watch;
use tokio::time::Instant;

/// A signature is accepted from five minutes before its timestamp to five minutes after, so a
/// callback can be repeated for ten minutes.
const REMEMBERED_FOR: Duration = Duration::from_mins(10);
/// The time after which a new bucket begins.
const BUCKET_SPAN: Duration = Duration::from_mins(1);
/// The most fingerprints in one bucket; then a new bucket begins at once. The hash table of a full
/// bucket has 4.5 MB, and would double for one more fingerprint.
const BUCKET_MAX: usize = 229_376;
/// Ten buckets begin within [`REMEMBERED_FOR`], and an older one ends within it. Full buckets hold
/// 2.5 million callbacks (4,200 per second) in 49 MB. At a higher rate, the filter forgets the
/// oldest callbacks earlier.
const BUCKETS_MAX: usize = 11;

/// The signed callbacks of the last ten minutes, published and in flight.
#[derive(Default)]
pub(crate) struct DuplicateFilter {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The channel of a callback closes when its outcome is known.
    in_flight: HashMap<Fingerprint, watch::Receiver<()>>,
    published: RecentFingerprints,
}

pub(crate) enum Admission<'a> {
    /// The caller publishes the callback.
    Publish(InFlightGuard<'a>),
    AlreadyPublished,
}

/// Marks a callback as in flight. If the guard is dropped before the callback is published, a
/// waiting repeat is admitted.
pub(crate) struct InFlightGuard<'a> {
    filter: &'a DuplicateFilter,
    fingerprint: Fingerprint,
    _outcome: watch::Sender<()>,
}

impl DuplicateFilter {
    /// Admits the callback unless it is already published. While another request publishes it, this
    /// waits for the outcome, so the caller needs a deadline.
    pub(crate) async fn admit(&self, fingerprint: Fingerprint) -> Admission<'_> {
        loop {
            let mut outcome = {
                let mut state = self.state.lock();
                if state.published.contains(&fingerprint, Instant::now()) {
                    return Admission::AlreadyPublished;
                }
                if let Some(outcome) = state.in_flight.get(&fingerprint) {
                    outcome.clone()
                } else {
                    let (sender, receiver) = watch::channel(());
                    state.in_flight.insert(fingerprint, receiver);
                    let guard = InFlightGuard { filter: self, fingerprint, _outcome: sender };
                    return Admission::Publish(guard);
                }
            };
            // No value is ever sent, so this ends when the sender is dropped.
            while outcome.changed().await.is_ok() {}
        }
    }
}

impl InFlightGuard<'_> {
    /// Records that the callback is durable: its repeats need not be published.
    pub(crate) fn mark_published(self) {
        let mut state = self.filter.state.lock();
        state.published.add(self.fingerprint, Instant::now());
    }
}

impl Drop for InFlightGuard<'_> {
    fn drop(&mut self) {
        // Remove the callback before the sender is dropped and wakes the waiting repeats: they must
        // not find this callback still in flight.
        self.filter.state.lock().in_flight.remove(&self.fingerprint);
    }
}

/// A bounded set of recent fingerprints. It forgets a whole bucket at a time, so that no request
/// has to wait while many fingerprints are moved or removed one by one.
#[derive(Default)]
struct RecentFingerprints {
    /// The newest bucket is at the front, because most repeats arrive soon.
    buckets: VecDeque<Bucket>,
}

struct Bucket {
    since: Instant,
    fingerprints: HashSet<Fingerprint>,
}

impl RecentFingerprints {
    fn contains(&mut self, fingerprint: &Fingerprint, now: Instant) -> bool {
        let is_outdated = |bucket: &Bucket| now - bucket.since > REMEMBERED_FOR + BUCKET_SPAN;
        while self.buckets.back().is_some_and(is_outdated) {
            self.buckets.pop_back();
        }
        self.buckets.iter().any(|bucket| bucket.fingerprints.contains(fingerprint))
    }

    fn add(&mut self, fingerprint: Fingerprint, now: Instant) {
        let is_open = |bucket: &&mut Bucket| {
            now - bucket.since < BUCKET_SPAN && bucket.fingerprints.len() < BUCKET_MAX
        };
        if let Some(newest) = self.buckets.front_mut().filter(is_open) {
            newest.fingerprints.insert(fingerprint);
            return;
        }
        self.buckets.truncate(BUCKETS_MAX - 1);
        self.buckets.push_front(Bucket { since: now, fingerprints: [fingerprint].into() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint(number: usize) -> Fingerprint {
        (number as u128).to_le_bytes()
    }

    async fn is_admitted(filter: &DuplicateFilter, number: usize) -> bool {
        matches!(filter.admit(fingerprint(number)).await, Admission::Publish(_))
    }

    async fn publish(filter: &DuplicateFilter, number: usize) {
        match filter.admit(fingerprint(number)).await {
            Admission::Publish(guard) => guard.mark_published(),
            Admission::AlreadyPublished => panic!("callback {number} is already published"),
        }
    }

    #[tokio::test]
    async fn published_duplicate_is_skipped_failed_one_is_retried() {
        let filter = DuplicateFilter::default();
        assert!(is_admitted(&filter, 1).await);
        assert!(is_admitted(&filter, 1).await);
        publish(&filter, 1).await;
        assert!(!is_admitted(&filter, 1).await);
        assert!(is_admitted(&filter, 2).await);
    }

    #[tokio::test]
    async fn after_a_failure_one_waiting_duplicate_is_published() {
        let filter = DuplicateFilter::default();
        let Admission::Publish(first) = filter.admit(fingerprint(1)).await else { panic!() };
        let duplicate = async || match filter.admit(fingerprint(1)).await {
            Admission::AlreadyPublished => false,
            Admission::Publish(guard) => {
                // The other duplicate waits while this one is in flight.
                tokio::task::yield_now().await;
                guard.mark_published();
                true
            }
        };
        let failing = async { drop(first) };
        let (second, third, ()) = tokio::join!(duplicate(), duplicate(), failing);
        assert!(second != third);
        assert!(filter.state.lock().in_flight.is_empty());
    }

    #[test]
    fn callback_is_remembered_for_ten_minutes_and_then_forgotten() {
        let mut recent = RecentFingerprints::default();
        let start = Instant::now();
        recent.add(fingerprint(0), start);
        for second in 1..=600 {
            let now = start + Duration::from_secs(second);
            recent.add(fingerprint(second.try_into().unwrap()), now);
            assert!(recent.contains(&fingerprint(0), now), "after {second} s");
        }
        let later = start + Duration::from_mins(12);
        assert!(!recent.contains(&fingerprint(0), later));
        assert!(recent.contains(&fingerprint(600), later));
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_are_forgotten_first() {
        let mut recent = RecentFingerprints::default();
        let start = Instant::now();
        for number in 0..=BUCKET_MAX {
            recent.add(fingerprint(number), start);
        }
        assert!(recent.contains(&fingerprint(0), start));
        // The last fingerprint began a new bucket, and the first bucket has not grown beyond its
        // bound.
        let capacities: Vec<usize> =
            recent.buckets.iter().map(|bucket| bucket.fingerprints.capacity()).collect();
        assert!(capacities.len() == 2 && capacities[1] <= BUCKET_MAX, "{capacities:?}");
        for minute in 1..20 {
            let now = start + BUCKET_SPAN * minute;
            recent.add(fingerprint(BUCKET_MAX + minute as usize), now);
            assert!(recent.buckets.len() <= BUCKETS_MAX);
        }
        assert!(!recent.contains(&fingerprint(0), start));
    }
}
