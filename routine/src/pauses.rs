//! Noticing that the database's clock was set.

use std::time::{Duration, Instant};

use store::Moment;

/// A step that is smaller does not count: it makes rows stale so much too early, and no more.
const TOLERANCE: Duration = Duration::from_secs(1);

/// Steps ahead of the database's clock, after which rows look older than they are.
///
/// Once `OBJECT_TTL` has passed since a step, every row that is not stale has been written anew by the
/// clock as it now is, and those that look stale are. A step back needs no such care: rows look
/// younger than they are, and stay for longer.
///
/// What a step is, is told by our own monotonic clock, so that it must happen while this process
/// runs. A clock that is slowly led to another time does not step.
#[derive(Default)]
pub(crate) struct Steps {
    /// What the clock said last, and before when it was asked.
    previous: Option<(Moment, Instant)>,
    latest: Option<Instant>,
}

impl Steps {
    /// Holds what the clock says `now`, by an answer between the two instants, against what it said
    /// before. Says how far it has stepped ahead, at least, if it has.
    pub(crate) fn look(
        &mut self,
        now: Moment,
        asked_at: Instant,
        answered_at: Instant,
    ) -> Option<Duration> {
        let (earlier, earlier_asked_at) = self.previous.replace((now, asked_at))?;
        // The longest time that can have passed, so that a slow answer is not taken for a step.
        let passed = answered_at.duration_since(earlier_asked_at);
        let step = now.ahead_of(earlier).checked_sub(passed).filter(|step| *step > TOLERANCE)?;
        self.latest = Some(answered_at);
        Some(step)
    }

    /// Whether a step is less than `ttl` ago.
    pub(crate) fn is_recent(&self, ttl: Duration) -> bool {
        self.latest.is_some_and(|latest| latest.elapsed() < ttl)
    }
}
