//! Whether an object is at fault when its lookups fail again and again, or an API that fails for a part of
//! all lookups, whatever the object.
//!
//! Decision: docs/decisions/0027-when-does-a-message-become-a-dead-letter.md

use std::collections::VecDeque;

/// How many first lookups are considered, the latest ones.
const CONSIDERED: usize = 50;
/// While at most this share of the other objects' first lookups fails, the API counts as well.
const FAILING_SHARE_MAX: f64 = 0.2;
/// Above that share, an object is at fault once it is this unlikely that an object without fault would have
/// failed as often.
const CHANCE_MAX: f64 = 0.001;

/// The first lookups of the latest objects. Later lookups of an object are those that failed before: they
/// would make objects that always fail look like a failing API.
#[derive(Default)]
pub(super) struct Evidence {
    latest: VecDeque<(i64, bool)>,
}

impl Evidence {
    pub(super) fn note(&mut self, id: i64, is_answered: bool) {
        if self.latest.len() == CONSIDERED {
            self.latest.pop_front();
        }
        self.latest.push_back((id, is_answered));
    }

    /// The share of the other objects' first lookups that failed: 1 while none is known, as after a restart
    /// in the midst of a partial outage.
    pub(super) fn failing_share(&self, id: i64) -> f64 {
        let (mut others, mut failed) = (0_u32, 0_u32);
        for (_, is_answered) in self.latest.iter().filter(|(other, _)| *other != id) {
            others += 1;
            failed += u32::from(!is_answered);
        }
        if others == 0 { 1.0 } else { f64::from(failed) / f64::from(others) }
    }
}

/// Whether it is an object's fault that this many of its lookups have failed, while this share of the other
/// objects' first lookups failed.
pub(crate) fn blames_object(failing_share: f64, failures: u32) -> bool {
    failing_share <= FAILING_SHARE_MAX || failing_share.powf(f64::from(failures)) <= CHANCE_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blames(evidence: &Evidence, id: i64, failures: u32) -> bool {
        blames_object(evidence.failing_share(id), failures)
    }

    /// Object 1000 has failed, and so has one in `of` of the others.
    fn evidence(failed: usize, of: usize) -> Evidence {
        let mut evidence = Evidence::default();
        for (id, number) in (0..).zip(0..CONSIDERED - 1) {
            evidence.note(id, number % of >= failed);
        }
        evidence.note(1_000, false);
        evidence
    }

    #[test]
    fn an_object_is_at_fault_while_others_succeed() {
        assert!(blames(&evidence(0, 1), 1_000, 1));
        assert!(blames(&evidence(1, 10), 1_000, 1));
        assert!(!blames(&Evidence::default(), 1_000, 1));
    }

    // Field case 5.3.
    #[test]
    fn a_partly_failing_api_is_at_fault_until_chance_is_ruled_out() {
        let most_fail = evidence(8, 10);
        assert!(!blames(&most_fail, 1_000, 20));
        assert!(blames(&most_fail, 1_000, 40));
        let half_fails = evidence(1, 2);
        assert!(!blames(&half_fails, 1_000, 4));
        assert!(blames(&half_fails, 1_000, 12));
        assert!(!blames(&evidence(1, 1), 1_000, u32::MAX));
    }

    #[test]
    fn only_the_latest_lookups_of_others_count() {
        let mut evidence = evidence(1, 1);
        for id in 0..50 {
            evidence.note(id, true);
        }
        assert!(blames(&evidence, 1_000, 1));
        for _ in 0..25 {
            evidence.note(7, false);
        }
        assert!(blames(&evidence, 7, 1));
        assert!(!blames(&evidence, 8, 1));
    }
}
