//! The right to one lookup, and what its outcome says about the API.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Breaker;
use super::adaptive_limit::Sample;
use super::verdict::Failure;
use crate::resizable_semaphore::Permit;

/// The outcome of a lookup, as far as it concerns the API.
pub(crate) enum Outcome<'a> {
    Answered,
    Failed(&'a dyn std::error::Error),
    /// The lookup failed for an object whose earlier failures have counted.
    FailedAgain(&'a dyn std::error::Error),
    /// The API asked for a pause of this length.
    AskedToWait(Duration),
}

/// Allows one lookup. Dropping the permit releases it without an outcome.
pub(crate) struct LookupPermit {
    breaker: Arc<Breaker>,
    number: u64,
    started: Instant,
    _permit: Permit,
}

impl Breaker {
    pub(super) fn start_lookup(self: &Arc<Self>, permit: Permit) -> LookupPermit {
        let mut state = self.state.lock();
        let number = state.next_number;
        state.next_number += 1;
        state.in_flight.insert(number);
        let in_flight = state.in_flight.len();
        if let Some(adaptive) = &mut state.adaptive {
            adaptive.record_start(in_flight);
        }
        drop(state);
        let started = Instant::now();
        LookupPermit { breaker: Arc::clone(self), number, started, _permit: permit }
    }
}

impl LookupPermit {
    /// Releases the permit with the outcome of the lookup. Returns a [`Failure`] if the lookup was
    /// not answered.
    pub(crate) fn complete(self, outcome: &Outcome) -> Option<Failure> {
        let (breaker, number) = (&self.breaker, self.number);
        breaker.update(|state| {
            state.in_flight.remove(&number);
            let answered_before = state.last_answer_at.is_some_and(|answered_at| {
                self.started.saturating_duration_since(answered_at) <= state.recent
            });
            let next_number = state.next_number;
            // A quarter of the limit: even if four of five lookups fail and answers are slow, the
            // failures that wait for their verdicts hold only about half of the permits for
            // unsettled lookups, and other lookups continue.
            let enough_answers = state.answer_count + (state.full_limit() as u64 / 4).max(1);
            // An object that fails again says nothing about the API. If such failures counted, a
            // few objects that always fail could open the breaker, because each of them is looked
            // up again with each attempt.
            let is_objects_fault = matches!(outcome, Outcome::FailedAgain(_)) && answered_before;
            let sample = match outcome {
                Outcome::Answered => Sample::Answer(self.started.elapsed()),
                Outcome::FailedAgain(_) if is_objects_fault => Sample::Ignored,
                _ => Sample::Failure,
            };
            breaker.adapt(state, number, sample);
            match outcome {
                Outcome::Answered => {
                    breaker.record_answer(state, number);
                    return None;
                }
                Outcome::FailedAgain(_) if is_objects_fault => {}
                Outcome::Failed(error) | Outcome::FailedAgain(error) => {
                    breaker.record_failure(state, number, *error);
                }
                Outcome::AskedToWait(wait) => breaker.pause(state, number, *wait),
            }
            Some(Failure { number, next_number, enough_answers, answered_before })
        })
    }
}

impl Drop for LookupPermit {
    fn drop(&mut self) {
        let mut state = self.breaker.state.lock();
        if state.in_flight.remove(&self.number) {
            self.breaker.adapt(&mut state, self.number, Sample::Ignored);
        }
    }
}
