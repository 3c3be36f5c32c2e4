//! When rows may look stale although nobody could have refreshed them.
//!
//! Decision: docs/decisions/0043-when-does-the-routine-pause-deletions.md

use std::time::{Duration, Instant};

use store::Moment;

/// A step that is smaller does not count: it makes rows stale so much too early, and no more.
const TOLERANCE: Duration = Duration::from_secs(1);

/// When to pause deletions for one `OBJECT_TTL`: rows may look stale because the database's clock was
/// set ahead, or because nobody could write for a while.
///
/// Once `OBJECT_TTL` has passed since then, every object that is still seen has been written anew, by
/// the clock as it now is, and those that look stale are. A step back needs no such care: rows look
/// younger than they are, and stay for longer.
///
/// - A step that happens while this process watches is measured by our own monotonic clock. A clock
///   that is slowly led to another time does not step.
/// - After a start or an outage there is nothing to compare with: a clock that was set before the start
///   and an hour without consumers look the same. Then [`Pauses::judge`] pauses if most of the table
///   looks stale. One such pause is enough until a cleanup succeeds, so that a database that is away
///   every now and then is still cleaned.
pub(crate) struct Pauses {
    /// What the clock said last, and before when it was asked.
    previous: Option<(Moment, Instant)>,
    /// When the latest pause began.
    began: Option<Instant>,
    /// The table has to be judged before anything is deleted.
    is_unjudged: bool,
    /// A pause for a table that looked stale has begun, and no cleanup has succeeded since.
    has_waited: bool,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { previous: None, began: None, is_unjudged: true, has_waited: false }
    }
}

impl Pauses {
    /// Compares what the clock says `now`, by an answer between the two instants, with what it said
    /// before. If it has stepped ahead, a pause begins; returns how far, at least.
    pub(crate) fn compare(
        &mut self,
        now: Moment,
        asked_at: Instant,
        answered_at: Instant,
    ) -> Option<Duration> {
        let (earlier, earlier_asked_at) = self.previous.replace((now, asked_at))?;
        // The longest time that can have passed, so that a slow answer is not taken for a step.
        let passed = answered_at.duration_since(earlier_asked_at);
        let step = now.ahead_of(earlier).checked_sub(passed).filter(|step| *step > TOLERANCE)?;
        self.began = Some(answered_at);
        Some(step)
    }

    /// The database was away, or took no writes.
    pub(crate) fn outage(&mut self) {
        self.is_unjudged = true;
    }

    /// Whether [`Pauses::judge`] is due.
    pub(crate) fn is_unjudged(&self) -> bool {
        self.is_unjudged && !self.has_waited
    }

    /// Begins a pause if more than half of all rows look stale; says whether it has.
    pub(crate) fn judge(&mut self, stale: u64, all: u64) -> bool {
        self.is_unjudged = false;
        let looks_stale = stale > all / 2;
        if looks_stale {
            self.began = Some(Instant::now());
            self.has_waited = true;
        }
        looks_stale
    }

    /// A cleanup has succeeded.
    pub(crate) fn cleaned(&mut self) {
        self.is_unjudged = false;
        self.has_waited = false;
    }

    /// How much of the latest pause is left.
    pub(crate) fn rest(&self, ttl: Duration) -> Option<Duration> {
        ttl.checked_sub(self.began?.elapsed()).filter(|rest| !rest.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_mins(1);

    #[test]
    fn a_mostly_stale_table_pauses_once_until_cleaned() {
        let mut pauses = Pauses::default();
        assert!(pauses.is_unjudged());
        assert!(pauses.judge(51, 100));
        assert!(pauses.rest(TTL).is_some());
        pauses.outage();
        assert!(!pauses.is_unjudged(), "one pause is enough");
        pauses.cleaned();
        pauses.outage();
        assert!(pauses.is_unjudged());
    }

    #[test]
    fn a_table_that_is_half_fresh_or_empty_does_not_pause() {
        for (stale, all) in [(0, 0), (0, 10), (5, 10), (1, 3)] {
            let mut pauses = Pauses::default();
            assert!(!pauses.judge(stale, all), "{stale} of {all}");
            assert_eq!(pauses.rest(TTL), None);
        }
    }
}
