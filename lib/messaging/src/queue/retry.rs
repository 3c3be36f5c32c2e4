//! The delay between attempts at a message.
//!
//! A delayed message is in one of several delay queues, and is moved back when its TTL ends. A
//! queue releases messages only in order, so an earlier message can hold up a later one. Each
//! queue therefore has a level: the longest delay of its messages. No message waits longer.
//!
//! Decision: docs/decisions/0015-how-are-failed-deliveries-delayed.md

use std::time::Duration;

/// The longest delay of each delay queue, in seconds, as in the names of the queues.
pub(crate) const LEVELS_SECONDS: [u64; 6] = [2, 4, 8, 16, 32, 60];

/// The longest delay.
pub(crate) const LONGEST: Duration = Duration::from_secs(LEVELS_SECONDS[LEVELS_SECONDS.len() - 1]);

/// A delay and its delay queue.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Delay {
    /// Index into [`LEVELS_SECONDS`].
    pub(crate) level: usize,
    pub(crate) length: Duration,
}

/// The delay after `failures` failed attempts (from 1): it doubles from 1–2 s to 30–60 s.
///
/// `jitter`, from 0 to 1, varies the delay within the level, so that messages that failed together
/// are not delivered together again. `at_least` lengthens the delay, up to the longest level.
pub(crate) fn delay(failures: u32, at_least: Option<Duration>, jitter: f64) -> Delay {
    let longest = LEVELS_SECONDS.len() - 1;
    let level_by_failures =
        usize::try_from(failures.saturating_sub(1)).map_or(longest, |n| n.min(longest));
    let at_least = at_least.unwrap_or_default();
    let fits = |level: &usize| Duration::from_secs(LEVELS_SECONDS[*level]) >= at_least;
    let level = (level_by_failures..longest).find(fits).unwrap_or(longest);
    let level_length = Duration::from_secs(LEVELS_SECONDS[level]);
    let jittered = level_length.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0);
    Delay { level, length: jittered.max(at_least).min(level_length) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delay_grows_from_one_second_to_sixty() {
        let shortest: Vec<u64> = (1..=8).map(|n| delay(n, None, 0.0).length.as_secs()).collect();
        let longest: Vec<u64> = (1..=8).map(|n| delay(n, None, 1.0).length.as_secs()).collect();
        assert_eq!(shortest, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(longest, [2, 4, 8, 16, 32, 60, 60, 60]);
    }

    // Field case 3.7.
    #[test]
    fn delay_is_bounded_for_any_count_and_any_request() {
        for (failures, at_least) in [(u32::MAX, None), (0, Some(Duration::MAX))] {
            assert!(delay(failures, at_least, 1.0).length <= LONGEST);
        }
    }

    #[test]
    fn delay_never_exceeds_its_level() {
        for failures in 1..20 {
            for at_least in [None, Some(3), Some(59), Some(3_600)] {
                let delay = delay(failures, at_least.map(Duration::from_secs), 1.0);
                assert!(delay.length <= Duration::from_secs(LEVELS_SECONDS[delay.level]));
            }
        }
    }

    #[test]
    fn retry_after_can_only_lengthen_the_delay() {
        let seconds = |n| Some(Duration::from_secs(n));
        assert_eq!(delay(1, seconds(10), 0.0), Delay { level: 3, length: Duration::from_secs(10) });
        assert_eq!(delay(5, seconds(1), 0.0), delay(5, None, 0.0));
        assert_eq!(delay(1, seconds(3_600), 0.0).length, Duration::from_mins(1));
    }
}
