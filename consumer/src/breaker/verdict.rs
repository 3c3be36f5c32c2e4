//! Whether a failed lookup counts as an attempt.

use std::sync::Arc;

use super::{Breaker, Phase, State};

/// A lookup that has failed.
pub(crate) struct Failure {
    pub(super) breaker: Arc<Breaker>,
    pub(super) number: u64,
    /// Lookups with this number or a higher one started after the failure.
    pub(super) next_number: u64,
    /// This many answers are enough, regardless of when their lookups started. An API that goes
    /// away answers the lookups that it has accepted, but meanwhile enough others fail to open the
    /// breaker.
    pub(super) enough_answers: u64,
    /// Whether the API had answered another lookup shortly before this one started.
    pub(super) answered_before: bool,
}

/// Whether a failure counts as an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The API answers other lookups, so the failure concerns the object.
    Counts,
    /// The API answers no lookups, or this is unknown. The object is looked up again at no cost.
    LookUpAgain,
}

impl Failure {
    /// Waits until other lookups have shown whether the API works. Without other lookups, this may
    /// never return.
    pub(crate) async fn verdict(&self) -> Verdict {
        let mut states = self.breaker.state.subscribe();
        let decided = states.wait_for(|state| self.verdict_by(state).is_some()).await;
        decided.ok().and_then(|state| self.verdict_by(&state)).unwrap_or(Verdict::LookUpAgain)
    }

    fn verdict_by(&self, state: &State) -> Option<Verdict> {
        if self.number < state.phase_start {
            return Some(Verdict::LookUpAgain);
        }
        // Not while half-open, because the breaker may open again at any moment.
        let answered_after =
            state.answered_up_to > self.next_number || state.answer_count >= self.enough_answers;
        (state.phase == Phase::Closed && answered_after).then_some(if self.answered_before {
            Verdict::Counts
        } else {
            Verdict::LookUpAgain
        })
    }
}
