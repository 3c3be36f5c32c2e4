//! The latest outcomes, and whether they show that the API is away.

use std::collections::VecDeque;

use crate::config::Lookups;

/// The breaker does not open with fewer lookups than this, including those in flight.
const OUTCOMES_MIN: usize = 20;

/// A window over a number of outcomes, not over a time: the number of lookups after which an outage
/// is noticed does not depend on their rate.
pub(super) struct Window {
    /// Whether each lookup was answered; the latest is at the back.
    outcomes: VecDeque<bool>,
    failures: usize,
    /// `BREAKER_WINDOW`.
    length: usize,
    /// `BREAKER_FAILURE_PERCENT`.
    failure_percent: usize,
}

impl Window {
    pub(super) fn new(lookups: &Lookups) -> Self {
        Self {
            outcomes: VecDeque::new(),
            failures: 0,
            length: lookups.breaker_window.into(),
            failure_percent: lookups.breaker_failure_percent.into(),
        }
    }

    /// Applies changed settings, and keeps the latest outcomes.
    pub(super) fn apply_settings(&mut self, lookups: &Lookups) {
        let before = std::mem::replace(self, Self::new(lookups));
        before.outcomes.into_iter().for_each(|answered| self.push(answered));
    }

    pub(super) fn clear(&mut self) {
        self.outcomes.clear();
        self.failures = 0;
    }

    pub(super) fn push(&mut self, answered: bool) {
        if self.outcomes.len() == self.length && self.outcomes.pop_front() == Some(false) {
            self.failures -= 1;
        }
        self.outcomes.push_back(answered);
        self.failures += usize::from(!answered);
    }

    /// Whether `failure_percent` of the lookups have failed. The `in_flight` lookups, which have no
    /// outcome yet, count as answered.
    pub(super) fn should_open(&self, in_flight: usize) -> bool {
        let all = self.outcomes.len() + in_flight;
        all >= OUTCOMES_MIN && self.failures * 100 >= all * self.failure_percent
    }
}
