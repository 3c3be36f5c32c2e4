//! The last outcomes, and whether they are those of an API that is away.

use std::collections::VecDeque;

use crate::config::Lookups;

/// Fewer outcomes say nothing.
const LEAST: usize = 20;

/// Counts outcomes, not time: it sees an outage within one round of lookups, however many or few there
/// are in a second.
pub(super) struct Window {
    answered: VecDeque<bool>,
    failures: usize,
    length: usize,
    /// How many of a hundred have to fail.
    failure_percent: usize,
}

impl Window {
    /// Of `BREAKER_WINDOW` and `BREAKER_FAILURE_PERCENT`.
    pub(super) fn new(lookups: &Lookups) -> Self {
        Self {
            answered: VecDeque::new(),
            failures: 0,
            length: lookups.breaker_window.into(),
            failure_percent: lookups.breaker_failure_percent.into(),
        }
    }

    /// Goes by the settings as they are now, with the outcomes that it has.
    pub(super) fn change(&mut self, lookups: &Lookups) {
        let before = std::mem::replace(self, Self::new(lookups));
        before.answered.into_iter().for_each(|answered| self.push(answered));
    }

    pub(super) fn clear(&mut self) {
        self.answered.clear();
        self.failures = 0;
    }

    pub(super) fn push(&mut self, answered: bool) {
        if self.answered.len() == self.length && self.answered.pop_front() == Some(false) {
            self.failures -= 1;
        }
        self.answered.push_back(answered);
        self.failures += usize::from(!answered);
    }

    /// Whether nearly all have failed, also if `pending` more are answered.
    pub(super) fn trip(&self, pending: usize) -> bool {
        let all = self.answered.len() + pending;
        all >= LEAST && self.failures * 100 >= all * self.failure_percent
    }
}
