//! Limits the number of lookups that start per second.
//!
//! Decision: docs/decisions/0032-how-is-the-lookup-rate-limited.md

use std::num::NonZeroU32;
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard, watch};
use tokio::time::{Instant, timeout_at};

/// A start that is late by up to this time does not delay the next ones, because the runtime's
/// clock counts milliseconds and a busy machine is late. So a second has at most 1% and one more
/// starts than the limit.
const CATCH_UP: Duration = Duration::from_millis(10);

pub(super) struct RateLimiter {
    /// The time between two starts; zero without a limit.
    interval: watch::Sender<Duration>,
    /// When the last start was due.
    last_due: Mutex<Instant>,
}

/// The right to start a lookup now. Others wait, in order, until it is consumed or dropped.
pub(super) struct StartSlot<'a> {
    due: Instant,
    last_due: MutexGuard<'a, Instant>,
}

impl RateLimiter {
    pub(super) fn new(per_second: Option<NonZeroU32>) -> Self {
        let interval = watch::Sender::new(interval(per_second));
        Self { interval, last_due: Mutex::new(Instant::now()) }
    }

    /// Changes the limit. It applies to lookups that already wait, too.
    pub(super) fn set_rate(&self, per_second: Option<NonZeroU32>) {
        self.interval.send_replace(interval(per_second));
    }

    pub(super) async fn wait(&self) -> StartSlot<'_> {
        let last_due = self.last_due.lock().await;
        let mut changes = self.interval.subscribe();
        loop {
            let due = *last_due + *changes.borrow_and_update();
            if due <= Instant::now() || timeout_at(due, changes.changed()).await.is_err() {
                return StartSlot { due, last_due };
            }
        }
    }
}

impl StartSlot<'_> {
    /// The lookup starts.
    pub(super) fn consume(mut self) {
        let now = Instant::now();
        *self.last_due = self.due.max(now.checked_sub(CATCH_UP).unwrap_or(now));
    }
}

/// The time between two starts.
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
        let at_once = || tokio::task::unconstrained(start(&limiter)).now_or_never();
        assert!((0..1_000).all(|_| at_once().is_some()));
    }

    #[tokio::test]
    async fn the_rate_is_never_exceeded_even_after_a_pause() {
        let limiter = RateLimiter::new(NonZeroU32::new(1_000));
        tokio::time::sleep(CATCH_UP * 5).await;
        let started = Instant::now();
        for _ in 0..300 {
            start(&limiter).await;
        }
        // The first ones caught up on the pause.
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
