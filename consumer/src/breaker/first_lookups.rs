//! Decides what is at fault when the lookups of an object fail repeatedly: the object, or an API
//! that fails for a part of all lookups, regardless of the object.
//!
//! Decision: docs/decisions/0027-when-does-a-message-become-a-dead-letter.md

use std::collections::VecDeque;

/// The number of latest first lookups that are considered.
const CONSIDERED: usize = 50;
/// If at most this share of the other objects' first lookups fails, the API works, and the object
/// is at fault.
const FAILING_SHARE_MAX: f64 = 0.2;
/// Above that share, an object is at fault once the probability that a random object would have
/// failed as often is at most this.
const CHANCE_MAX: f64 = 0.001;

/// The first lookups of the latest objects. Repeated lookups are not included: objects that always
/// fail would look like a failing API.
#[derive(Default)]
pub(super) struct FirstLookups {
    latest: VecDeque<(i64, bool)>,
}

impl FirstLookups {
    pub(super) fn record(&mut self, id: i64, is_answered: bool) {
        if self.latest.len() == CONSIDERED {
            self.latest.pop_front();
        }
        self.latest.push_back((id, is_answered));
    }

    /// The share of the other objects' first lookups that failed; 1 if no such lookup is known, for
    /// example after a restart during a partial outage.
    pub(super) fn failing_share(&self, id: i64) -> f64 {
        let (mut others, mut failed) = (0_u32, 0_u32);
        for (_, is_answered) in self.latest.iter().filter(|(other, _)| *other != id) {
            others += 1;
            failed += u32::from(!is_answered);
        }
        if others == 0 { 1.0 } else { f64::from(failed) / f64::from(others) }
    }
}

/// Whether an object is at fault after this many failed lookups, if `failing_share` of the other
/// objects' first lookups failed.
pub(crate) fn is_object_at_fault(failing_share: f64, failures: u32) -> bool {
    failing_share <= FAILING_SHARE_MAX || failing_share.powf(f64::from(failures)) <= CHANCE_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_at_fault(lookups: &FirstLookups, id: i64, failures: u32) -> bool {
        is_object_at_fault(lookups.failing_share(id), failures)
    }

    /// Object 1000 has failed, and so have `failed` of every `of` other objects.
    fn lookups(failed: usize, of: usize) -> FirstLookups {
        let mut lookups = FirstLookups::default();
        for (id, number) in (0..).zip(0..CONSIDERED - 1) {
            lookups.record(id, number % of >= failed);
        }
        lookups.record(1_000, false);
        lookups
    }

    #[test]
    fn an_object_is_at_fault_while_others_succeed() {
        assert!(is_at_fault(&lookups(0, 1), 1_000, 1));
        assert!(is_at_fault(&lookups(1, 10), 1_000, 1));
        assert!(!is_at_fault(&FirstLookups::default(), 1_000, 1));
    }

    // Field case 5.3.
    #[test]
    fn a_partly_failing_api_is_at_fault_until_chance_is_ruled_out() {
        let most_fail = lookups(8, 10);
        assert!(!is_at_fault(&most_fail, 1_000, 20));
        assert!(is_at_fault(&most_fail, 1_000, 40));
        let half_fails = lookups(1, 2);
        assert!(!is_at_fault(&half_fails, 1_000, 4));
        assert!(is_at_fault(&half_fails, 1_000, 12));
        assert!(!is_at_fault(&lookups(1, 1), 1_000, u32::MAX));
    }

    #[test]
    fn only_the_latest_lookups_of_others_count() {
        let mut lookups = lookups(1, 1);
        for id in 0..50 {
            lookups.record(id, true);
        }
        assert!(is_at_fault(&lookups, 1_000, 1));
        // Now half of the 50 latest lookups are failures of object 7.
        for _ in 0..25 {
            lookups.record(7, false);
        }
        assert!(is_at_fault(&lookups, 7, 1));
        assert!(!is_at_fault(&lookups, 8, 1));
    }
}
