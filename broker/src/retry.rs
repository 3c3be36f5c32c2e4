//! How long a failed delivery waits before it is tried again.
//!
//! A waiting message lies in one of a few delay queues and comes back when its time to live ends. A
//! queue lets messages go in order only, so each queue holds waits of the same size: within a level
//! a message can be held up by an earlier one, but never beyond the level's own length.
//!
//! Decision: docs/decisions/0015-how-are-failed-deliveries-delayed.md

use std::time::Duration;

/// The lengths of the delay queues, in seconds, as they appear in the queues' names.
pub(crate) const LEVELS_SECONDS: [u64; 6] = [2, 4, 8, 16, 32, 60];

/// The longest wait there is.
pub(crate) const LONGEST: Duration = Duration::from_secs(LEVELS_SECONDS[LEVELS_SECONDS.len() - 1]);

/// A wait: the delay queue to lie in, and for how long.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Wait {
    /// Index into [`LEVELS_SECONDS`].
    pub(crate) level: usize,
    pub(crate) length: Duration,
}

/// The wait after `failures` failed attempts (from 1): doubling from 1–2 s up to 30–60 s.
///
/// `jitter`, from 0 to 1, places it within the level, so that what failed together does not come
/// back together. A peer's own `at_least` lengthens it, up to the longest level.
pub(crate) fn wait(failures: u32, at_least: Option<Duration>, jitter: f64) -> Wait {
    let longest = LEVELS_SECONDS.len() - 1;
    let by_failures =
        usize::try_from(failures.saturating_sub(1)).map_or(longest, |n| n.min(longest));
    let at_least = at_least.unwrap_or_default();
    let fits = |level: &usize| Duration::from_secs(LEVELS_SECONDS[*level]) >= at_least;
    let level = (by_failures..longest).find(fits).unwrap_or(longest);
    let full = Duration::from_secs(LEVELS_SECONDS[level]);
    let drawn = full.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
    Wait { level, length: drawn.max(at_least).min(full) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_grows_from_one_second_to_sixty() {
        let shortest: Vec<u64> = (1..=8).map(|n| wait(n, None, 0.0).length.as_secs()).collect();
        let longest: Vec<u64> = (1..=8).map(|n| wait(n, None, 1.0).length.as_secs()).collect();
        assert_eq!(shortest, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(longest, [2, 4, 8, 16, 32, 60, 60, 60]);
    }

    // Field case 3.7.
    #[test]
    fn no_count_and_no_request_of_a_peer_is_too_large() {
        for (failures, at_least) in [(u32::MAX, None), (0, Some(Duration::MAX))] {
            assert!(wait(failures, at_least, 1.0).length <= LONGEST);
        }
    }

    #[test]
    fn a_wait_never_outlasts_its_level_so_that_it_holds_nobody_up() {
        for failures in 1..20 {
            for at_least in [None, Some(3), Some(59), Some(3_600)] {
                let wait = wait(failures, at_least.map(Duration::from_secs), 1.0);
                assert!(wait.length <= Duration::from_secs(LEVELS_SECONDS[wait.level]));
            }
        }
    }

    #[test]
    fn retry_after_lengthens_the_wait_but_never_shortens_it() {
        let seconds = |n| Some(Duration::from_secs(n));
        assert_eq!(wait(1, seconds(10), 0.0), Wait { level: 3, length: Duration::from_secs(10) });
        assert_eq!(wait(5, seconds(1), 0.0), wait(5, None, 0.0));
        assert_eq!(wait(1, seconds(3_600), 0.0).length, Duration::from_mins(1));
    }
}
