//! Signed callbacks that come again: each is published once.
//!
//! Which ones are under way and which are done is known to this process alone, and not after its
//! end: publishing is at-least-once all the same, and this spares repeats, it does not rule them out.
//!
//! Decision: docs/decisions/0012-when-are-two-callbacks-the-same.md

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use authenticity::Fingerprint;
use tokio::sync::watch;
use tokio::time::Instant;

/// A signature holds from five minutes before its time to five minutes after, so who sends the same
/// again can do so for ten minutes.
const REMEMBERED_FOR: Duration = Duration::from_mins(10);
/// How long what is done is gathered before the next bucket begins.
const BUCKET_SPAN: Duration = Duration::from_mins(1);
/// Where the next one begins before its time: a table of 4.5 MB, which would double to hold one more.
const BUCKET_MAX: usize = 229_376;
/// As many as begin within [`REMEMBERED_FOR`], and the one that ends in it. All of them full, it is
/// 49 MB for 2.5 million callbacks, which is 4,200 per second; beyond that the oldest go earlier.
const BUCKETS_MAX: usize = 11;

/// The signed callbacks of the last ten minutes.
#[derive(Default)]
pub(crate) struct Repeats {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Each is closed when the callback's outcome is known.
    under_way: HashMap<Fingerprint, watch::Receiver<()>>,
    published: Memory,
}

/// Whose turn it is to publish a callback.
pub(crate) enum Turn<'a> {
    /// The caller's.
    Ours(UnderWay<'a>),
    /// Nobody's: it has been published.
    Published,
}

/// A callback that is being published by the holder. If it is dropped before it is published, the
/// next repeat gets its turn.
pub(crate) struct UnderWay<'a> {
    repeats: &'a Repeats,
    fingerprint: Fingerprint,
    _outcome: watch::Sender<()>,
}

impl Repeats {
    /// Finds out whose turn it is. While somebody else has it, this waits for the outcome, which is
    /// why the caller needs a deadline.
    pub(crate) async fn turn(&self, fingerprint: Fingerprint) -> Turn<'_> {
        loop {
            let mut outcome = {
                let mut state = self.lock();
                if state.published.has(&fingerprint, Instant::now()) {
                    return Turn::Published;
                }
                if let Some(outcome) = state.under_way.get(&fingerprint) {
                    outcome.clone()
                } else {
                    let (sender, receiver) = watch::channel(());
                    state.under_way.insert(fingerprint, receiver);
                    return Turn::Ours(UnderWay { repeats: self, fingerprint, _outcome: sender });
                }
            };
            // Nothing is ever sent, so this ends when the sender is dropped.
            while outcome.changed().await.is_ok() {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UnderWay<'_> {
    /// It is durable: whoever repeats it can be told so.
    pub(crate) fn published(self) {
        let mut state = self.repeats.lock();
        state.published.add(self.fingerprint, Instant::now());
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        // Before the sender is dropped, so that whoever waits finds nothing in the way.
        self.repeats.lock().under_way.remove(&self.fingerprint);
    }
}

/// Fingerprints for a while, a bounded number of them, without a moment at which many of them have
/// to be moved or forgotten one by one.
#[derive(Default)]
struct Memory {
    /// The newest is at the front, where most repeats are found.
    buckets: VecDeque<Bucket>,
}

struct Bucket {
    since: Instant,
    fingerprints: HashSet<Fingerprint>,
}

impl Memory {
    fn has(&mut self, fingerprint: &Fingerprint, now: Instant) -> bool {
        let outdated = |bucket: &Bucket| now - bucket.since > REMEMBERED_FOR + BUCKET_SPAN;
        while self.buckets.back().is_some_and(outdated) {
            self.buckets.pop_back();
        }
        self.buckets.iter().any(|bucket| bucket.fingerprints.contains(fingerprint))
    }

    fn add(&mut self, fingerprint: Fingerprint, now: Instant) {
        let open = |bucket: &&mut Bucket| {
            now - bucket.since < BUCKET_SPAN && bucket.fingerprints.len() < BUCKET_MAX
        };
        if let Some(newest) = self.buckets.front_mut().filter(open) {
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

    async fn is_ours(repeats: &Repeats, number: usize) -> bool {
        matches!(repeats.turn(fingerprint(number)).await, Turn::Ours(_))
    }

    async fn publish(repeats: &Repeats, number: usize) {
        match repeats.turn(fingerprint(number)).await {
            Turn::Ours(turn) => turn.published(),
            Turn::Published => panic!("{number} is published already"),
        }
    }

    #[tokio::test]
    async fn what_is_published_is_nobodys_turn_and_what_failed_is_the_next_ones() {
        let repeats = Repeats::default();
        assert!(is_ours(&repeats, 1).await);
        assert!(is_ours(&repeats, 1).await);
        publish(&repeats, 1).await;
        assert!(!is_ours(&repeats, 1).await);
        assert!(is_ours(&repeats, 2).await);
    }

    #[tokio::test]
    async fn of_those_who_wait_one_gets_the_turn_that_failed_and_the_others_wait_on() {
        let repeats = Repeats::default();
        let Turn::Ours(first) = repeats.turn(fingerprint(1)).await else { panic!() };
        let waiting = async || match repeats.turn(fingerprint(1)).await {
            Turn::Published => false,
            Turn::Ours(turn) => {
                // The other one is still waiting while this one has the turn.
                tokio::task::yield_now().await;
                turn.published();
                true
            }
        };
        let failing = async { drop(first) };
        let (second, third, ()) = tokio::join!(waiting(), waiting(), failing);
        assert!(second != third);
        assert!(repeats.lock().under_way.is_empty());
    }

    #[test]
    fn a_callback_is_remembered_for_ten_minutes_and_not_for_much_longer() {
        let mut memory = Memory::default();
        let start = Instant::now();
        memory.add(fingerprint(0), start);
        for second in 1..=600 {
            let now = start + Duration::from_secs(second);
            memory.add(fingerprint(second.try_into().unwrap()), now);
            assert!(memory.has(&fingerprint(0), now), "after {second} s");
        }
        let later = start + Duration::from_mins(12);
        assert!(!memory.has(&fingerprint(0), later));
        assert!(memory.has(&fingerprint(600), later));
    }

    #[test]
    fn the_memory_is_bounded_and_the_oldest_go_first() {
        let mut memory = Memory::default();
        let start = Instant::now();
        for number in 0..=BUCKET_MAX {
            memory.add(fingerprint(number), start);
        }
        assert!(memory.has(&fingerprint(0), start));
        // The last one has a bucket of its own, and the first has not grown beyond what is said of it.
        let capacities: Vec<usize> =
            memory.buckets.iter().map(|bucket| bucket.fingerprints.capacity()).collect();
        assert!(capacities.len() == 2 && capacities[1] <= BUCKET_MAX, "{capacities:?}");
        for minute in 1..20 {
            let now = start + BUCKET_SPAN * minute;
            memory.add(fingerprint(BUCKET_MAX + minute as usize), now);
            assert!(memory.buckets.len() <= BUCKETS_MAX);
        }
        assert!(!memory.has(&fingerprint(0), start));
    }
}
