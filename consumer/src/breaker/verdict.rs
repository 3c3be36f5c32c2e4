//! Whose fault it is when a lookup fails.

use std::sync::Arc;

use super::{Breaker, Phase, State};

/// A lookup that has failed.
pub(crate) struct Failure {
    pub(super) breaker: Arc<Breaker>,
    pub(super) number: u64,
    /// A lookup from this number on has begun after the failure.
    pub(super) after: u64,
    /// With so many answers there are enough, whenever they were asked for. An API that goes away
    /// answers some to its last, but fails more meanwhile than it takes to open.
    pub(super) enough: u64,
    pub(super) answered_before: bool,
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The API answers others, so it is about this object.
    Counts,
    /// The API answers nobody, or it cannot be told.
    LookAgain,
}

impl Failure {
    /// Waits for what tells whose fault it is, which while nothing else is looked up may never come.
    pub(crate) async fn verdict(&self) -> Verdict {
        let mut states = self.breaker.state.subscribe();
        let decided = states.wait_for(|state| self.verdict_by(state).is_some()).await;
        decided.ok().and_then(|state| self.verdict_by(&state)).unwrap_or(Verdict::LookAgain)
    }

    fn verdict_by(&self, state: &State) -> Option<Verdict> {
        if self.number < state.since {
            return Some(Verdict::LookAgain);
        }
        // While it opens up, the next thing may be that it opens again.
        let answers = state.answered_upto > self.after || state.answers >= self.enough;
        (state.phase == Phase::Closed && answers).then_some(if self.answered_before {
            Verdict::Counts
        } else {
            Verdict::LookAgain
        })
    }
}
