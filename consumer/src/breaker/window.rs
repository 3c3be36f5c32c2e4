//! The latest outcomes, and whether they show that the API is away.

use std::collections::VecDeque;

use crate::config::Lookups;

/// Fewer outcomes say nothing about the API.
const OUTCOMES_MIN: usize = 20;

/// Counts outcomes instead of time, and so notices an outage within one round of lookups at any
/// rate.
pub(super) struct Window {
    answered: VecDeque<bool>,
    failures: usize,
    /// `BREAKER_WINDOW`.
    length: usize,
    /// `BREAKER_FAILURE_PERCENT`.
    failure_percent: usize,
}

impl Window {
    pub(super) fn new(lookups: &Lookups) -> Self {
        Self {
            answered: VecDeque::new(),
            failures: 0,
            length: lookups.breaker_window.into(),
            failure_percent: lookups.breaker_failure_percent.into(),
        }
    }

    /// Applies changed settings, and keeps the latest outcomes.
    pub(super) fn apply_settings(&mut self, lookups: &Lookups) {
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

    /// Whether nearly all lookups have failed, even if `in_flight` more are answered.
    pub(super) fn should_open(&self, in_flight: usize) -> bool {
        let all = self.answered.len() + in_flight;
        all >= OUTCOMES_MIN && self.failures * 100 >= all * self.failure_percent
    }
}
