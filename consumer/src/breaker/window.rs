//! The last outcomes, and whether they are those of an API that is away.

use std::collections::VecDeque;

const LENGTH: usize = 50;
/// Fewer outcomes say nothing.
const LEAST: usize = 20;
/// At half of the objects failing, chance makes so many failures of 50 once in ten million times.
const FAILED_PERCENT: usize = 85;

/// Counts outcomes, not time: it sees an outage within one round of lookups, however many or few there
/// are in a second.
#[derive(Default)]
pub(super) struct Window {
    answered: VecDeque<bool>,
    failures: usize,
}

impl Window {
    pub(super) fn push(&mut self, answered: bool) {
        if self.answered.len() == LENGTH && self.answered.pop_front() == Some(false) {
            self.failures -= 1;
        }
        self.answered.push_back(answered);
        self.failures += usize::from(!answered);
    }

    /// Whether nearly all have failed, also if `pending` more are answered.
    pub(super) fn trip(&self, pending: usize) -> bool {
        let all = self.answered.len() + pending;
        all >= LEAST && self.failures * 100 >= all * FAILED_PERCENT
    }
}
