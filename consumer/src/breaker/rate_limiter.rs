//! Limits the number of lookups that start per second.
//!
//! Decision: docs/decisions/0032-how-is-the-lookup-rate-limited.md

use std::num::NonZeroU32;
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard, watch};
use tokio::time::{Instant, timeout_at};

/// A start that is late by up to this time does not delay later starts: they catch up. Otherwise,
/// the rate would stay below the limit, because tokio's clock counts milliseconds, and a busy
/// machine is often late. In turn, one second can have the starts of 1.01 s, and one more.
const CATCH_UP: Duration = Duration::from_millis(10);

pub(super) struct RateLimiter {
    /// The time between two starts; zero without a limit.
    interval: watch::Sender<Duration>,
    /// The next start is due one interval after this time: when the last start was due or, if that
    /// is later, `CATCH_UP` before the last start.
    interval_start: Mutex<Instant>,
}

/// The right to start a lookup now. Other lookups wait, in order, until the slot is consumed or
/// dropped.
pub(super) struct StartSlot<'a> {
    due: Instant,
    interval_start: MutexGuard<'a, Instant>,
}

impl RateLimiter {
    pub(super) fn new(per_second: Option<NonZeroU32>) -> Self {
        let interval = watch::Sender::new(interval(per_second));
        Self { interval, interval_start: Mutex::new(Instant::now()) }
    }

    /// Changes the limit. The new limit also applies to lookups that already wait.
    pub(super) fn set_rate(&self, per_second: Option<NonZeroU32>) {
        self.interval.send_replace(interval(per_second));
    }

    pub(super) async fn wait(&self) -> StartSlot<'_> {
        let interval_start = self.interval_start.lock().await;
        let mut changes = self.interval.subscribe();
        loop {
            let due = *interval_start + *changes.borrow_and_update();
            if due <= Instant::now() || timeout_at(due, changes.changed()).await.is_err() {
                return StartSlot { due, interval_start };
            }
        }
    }
}

impl StartSlot<'_> {
    /// Records that the lookup starts now.
    pub(super) fn consume(mut self) {
        let now = Instant::now();
        *self.interval_start = self.due.max(now.checked_sub(CATCH_UP).unwrap_or(now));
    }
}

pub(super) fn interval(per_second: Option<NonZeroU32>) -> Duration {
    per_second.map_or(Duration::ZERO, |per_second| Duration::from_secs(1) / per_second.get())
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt as _;

    use super::*;

    async fn start(limiter: &RateLimiter) {
        limiter.wait().await.consume();
    }

    #[tokio::test]
    async fn without_a_limit_no_start_waits() {
        let limiter = RateLimiter::new(None);
        // Unconstrained, because tokio's budget would make a poll return pending now and then.
        let start_now = || tokio::task::unconstrained(start(&limiter)).now_or_never();
        assert!((0..1_000).all(|_| start_now().is_some()));
    }

    #[tokio::test]
    async fn starts_catch_up_on_only_a_part_of_a_pause() {
        let limiter = RateLimiter::new(NonZeroU32::new(1_000));
        tokio::time::sleep(CATCH_UP * 5).await;
        let started = Instant::now();
        for _ in 0..300 {
            start(&limiter).await;
        }
        // The 300 starts have 299 intervals. The first starts catch up on `CATCH_UP` of the pause.
        let elapsed = started.elapsed();
        assert!(elapsed + CATCH_UP >= Duration::from_millis(299), "{elapsed:?}");
    }

    #[tokio::test]
    async fn removing_the_limit_lets_a_waiter_start() {
        let limiter = RateLimiter::new(NonZeroU32::new(1));
        start(&limiter).await;
        let mut waiter = pin!(start(&limiter));
        assert!(waiter.as_mut().now_or_never().is_none());
        limiter.set_rate(None);
        assert!(waiter.now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_lowered_limit_applies_to_a_waiter() {
        let limiter = RateLimiter::new(NonZeroU32::new(50));
        start(&limiter).await;
        let mut waiter = pin!(start(&limiter));
        assert!(waiter.as_mut().now_or_never().is_none());
        limiter.set_rate(NonZeroU32::new(1));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(waiter.now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_dropped_slot_goes_to_the_next_waiter() {
        let limiter = RateLimiter::new(None);
        let slot = limiter.wait().await;
        let mut next = pin!(start(&limiter));
        assert!(next.as_mut().now_or_never().is_none());
        drop(slot);
        assert!(next.now_or_never().is_some());
    }
}
