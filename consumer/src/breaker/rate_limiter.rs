//! How many lookups may begin in a second.
//!
//! Decision: docs/decisions/0032-how-is-the-lookup-rate-limited.md

use std::num::NonZeroU32;
use std::time::Duration;

use tokio::sync::{Mutex, MutexGuard, watch};
use tokio::time::{Instant, timeout_at};

/// What was missed, of the last so long, may be made up for: the runtime's clock counts milliseconds, and a
/// busy machine is late. So a second has at most a hundredth more than it should, and one.
const MADE_UP: Duration = Duration::from_millis(10);

pub(super) struct Pace {
    /// The time from one beginning to the next; zero while there is no limit.
    between: watch::Sender<Duration>,
    /// When the last one was due.
    last: Mutex<Instant>,
}

/// Whoever may begin now; the others wait behind it, in order.
pub(super) struct Turn<'a> {
    due: Instant,
    last: MutexGuard<'a, Instant>,
}

impl Pace {
    pub(super) fn new(per_second: Option<NonZeroU32>) -> Self {
        let last = Mutex::new(Instant::now());
        Self { between: watch::Sender::new(between(per_second)), last }
    }

    /// Also whoever waits already goes by it.
    pub(super) fn change(&self, per_second: Option<NonZeroU32>) {
        self.between.send_replace(between(per_second));
    }

    /// Waits for its turn, which is over when it is [taken](Turn::taken) or dropped.
    pub(super) async fn turn(&self) -> Turn<'_> {
        let last = self.last.lock().await;
        let mut changes = self.between.subscribe();
        loop {
            let due = *last + *changes.borrow_and_update();
            if due <= Instant::now() || timeout_at(due, changes.changed()).await.is_err() {
                return Turn { due, last };
            }
        }
    }
}

impl Turn<'_> {
    /// It begins.
    pub(super) fn taken(mut self) {
        let now = Instant::now();
        *self.last = self.due.max(now.checked_sub(MADE_UP).unwrap_or(now));
    }
}

/// The time from one beginning to the next.
pub(super) fn between(per_second: Option<NonZeroU32>) -> Duration {
    per_second.map_or(Duration::ZERO, |per_second| Duration::from_secs(1) / per_second.get())
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt as _;

    use super::*;

    async fn begin(pace: &Pace) {
        pace.turn().await.taken();
    }

    #[tokio::test]
    async fn without_a_limit_nobody_waits() {
        let pace = Pace::new(None);
        // Or the runtime would have it wait for its sake, once in a while.
        let at_once = || tokio::task::unconstrained(begin(&pace)).now_or_never();
        assert!((0..1_000).all(|_| at_once().is_some()));
    }

    #[tokio::test]
    async fn in_a_second_no_more_begin_than_may_also_after_a_lull() {
        let pace = Pace::new(NonZeroU32::new(1_000));
        tokio::time::sleep(MADE_UP * 5).await;
        let began = Instant::now();
        for _ in 0..300 {
            begin(&pace).await;
        }
        // The first of them made up for what was missed.
        assert!(began.elapsed() + MADE_UP >= Duration::from_millis(299), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn a_limit_that_is_raised_or_taken_away_lets_those_begin_who_wait() {
        let pace = Pace::new(NonZeroU32::new(1));
        begin(&pace).await;
        let mut begun = pin!(begin(&pace));
        assert!(begun.as_mut().now_or_never().is_none());
        pace.change(None);
        assert!(begun.now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_limit_that_is_lowered_holds_for_whoever_waits_already() {
        let pace = Pace::new(NonZeroU32::new(50));
        begin(&pace).await;
        let mut begun = pin!(begin(&pace));
        assert!(begun.as_mut().now_or_never().is_none());
        pace.change(NonZeroU32::new(1));
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(begun.now_or_never().is_none());
    }

    #[tokio::test]
    async fn who_gives_up_its_turn_leaves_it_to_the_next() {
        let pace = Pace::new(None);
        let turn = pace.turn().await;
        let mut next = pin!(begin(&pace));
        assert!(next.as_mut().now_or_never().is_none());
        drop(turn);
        assert!(next.now_or_never().is_some());
    }
}
