//! Pauses deletions when rows may look stale only because they could not be refreshed.
//!
//! Decision: docs/decisions/0043-when-does-the-routine-pause-deletions.md

use std::time::{Duration, Instant};

use store::Moment;

/// Smaller steps cause no pause: rows then become stale too early by less than this time.
const TOLERANCE: Duration = Duration::from_secs(1);

/// Decides when to pause deletions for one `OBJECT_TTL`: when rows may look stale only because the
/// database's clock was set ahead, or because no consumer could write for a while.
///
/// The monotonic clock of this process shows whether the database's clock has stepped. A step back
/// needs no pause: rows look younger and stay longer. At a start there is no earlier reading, and
/// in an outage consumers could not write. [`Pauses::check_table`] then begins a pause if most rows
/// look stale. It begins only one until a cleanup succeeds, so that a database with frequent
/// outages is still cleaned.
pub(crate) struct Pauses {
    /// The last reading of the clock, and an instant just before it.
    previous: Option<(Moment, Instant)>,
    /// When the latest pause began.
    paused_at: Option<Instant>,
    /// Whether to check the table before anything is deleted.
    needs_check: bool,
    /// Whether a check has begun a pause since the last successful cleanup.
    has_paused: bool,
}

impl Default for Pauses {
    fn default() -> Self {
        Self { previous: None, paused_at: None, needs_check: true, has_paused: false }
    }
}

impl Pauses {
    /// Compares a reading of the database's clock with the previous one. The reading was requested
    /// at `requested_at` and arrived at `received_at`. If the clock has stepped ahead, begins a
    /// pause and returns the minimum size of the step.
    pub(crate) fn compare(
        &mut self,
        reading: Moment,
        requested_at: Instant,
        received_at: Instant,
    ) -> Option<Duration> {
        let (earlier, earlier_requested_at) = self.previous.replace((reading, requested_at))?;
        // The longest time that can have passed, so that a slow response does not look like a step.
        let passed = received_at.duration_since(earlier_requested_at);
        let step =
            reading.ahead_of(earlier).checked_sub(passed).filter(|step| *step > TOLERANCE)?;
        self.paused_at = Some(received_at);
        Some(step)
    }

    /// Records that the database was away or rejected writes.
    pub(crate) fn record_outage(&mut self) {
        self.needs_check = true;
    }

    /// Whether [`Pauses::check_table`] is due.
    pub(crate) fn is_check_due(&self) -> bool {
        self.needs_check && !self.has_paused
    }

    /// Begins a pause if more than half of all rows look stale, and returns whether it did.
    pub(crate) fn check_table(&mut self, stale: u64, all: u64) -> bool {
        self.needs_check = false;
        let is_mostly_stale = stale > all / 2;
        if is_mostly_stale {
            self.paused_at = Some(Instant::now());
            self.has_paused = true;
        }
        is_mostly_stale
    }

    /// Records that a cleanup has succeeded.
    pub(crate) fn record_cleanup(&mut self) {
        self.needs_check = false;
        self.has_paused = false;
    }

    /// The remaining time of the latest pause, if it has not ended.
    pub(crate) fn remaining(&self, ttl: Duration) -> Option<Duration> {
        ttl.checked_sub(self.paused_at?.elapsed()).filter(|remaining| !remaining.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_mins(1);

    #[test]
    fn a_mostly_stale_table_pauses_once_until_cleaned() {
        let mut pauses = Pauses::default();
        assert!(pauses.is_check_due());
        assert!(pauses.check_table(51, 100));
        assert!(pauses.remaining(TTL).is_some());
        pauses.record_outage();
        assert!(!pauses.is_check_due(), "one pause is enough");
        pauses.record_cleanup();
        pauses.record_outage();
        assert!(pauses.is_check_due());
    }

    #[test]
    fn a_table_that_is_half_fresh_or_empty_does_not_pause() {
        for (stale, all) in [(0, 0), (0, 10), (5, 10), (1, 3)] {
            let mut pauses = Pauses::default();
            assert!(!pauses.check_table(stale, all), "{stale} of {all}");
            assert_eq!(pauses.remaining(TTL), None);
        }
    }
}
