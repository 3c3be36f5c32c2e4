//! The verdict on a failed lookup: whether the failure counts as an attempt at the messages of its
//! object. It does not count while the API fails as a whole.

use tokio::sync::oneshot;

use super::{Breaker, Phase, State};

#[derive(Clone, Copy)]
pub(crate) struct Failure {
    /// The number of the failed lookup.
    pub(super) number: u64,
    /// The number of the first lookup that started after the failure.
    pub(super) next_number: u64,
    /// Once the breaker has counted this many answers, the API is known to work, even if all
    /// answered lookups started before the failure. An API that goes down may still answer lookups
    /// that it has accepted, but the breaker opens before they are this many.
    pub(super) enough_answers: u64,
    /// Whether the API had answered another lookup shortly before this one started.
    pub(super) answered_before: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The API answered other lookups before and after the failed one, so the failure concerns the
    /// object.
    Counts,
    /// The API did not work, or may not have worked. The object is looked up again, and the failure
    /// does not count as an attempt.
    LookUpAgain,
}

/// A failure whose verdict is awaited.
pub(super) struct UndecidedFailure {
    failure: Failure,
    verdict_sender: oneshot::Sender<Verdict>,
}

impl Breaker {
    /// Waits until other lookups have shown whether the API works. Without other lookups, this may
    /// never return.
    pub(crate) async fn wait_for_verdict(&self, failure: Failure) -> Verdict {
        let (sender, verdict) = oneshot::channel();
        {
            let mut state = self.state.lock();
            // Drop the failures whose verdict is not awaited any more.
            state.undecided_failures.retain(|undecided| !undecided.verdict_sender.is_closed());
            state.undecided_failures.push(UndecidedFailure { failure, verdict_sender: sender });
            state.send_verdicts();
        }
        verdict.await.unwrap_or(Verdict::LookUpAgain)
    }
}

impl State {
    /// Sends the verdicts that are known by now.
    pub(super) fn send_verdicts(&mut self) {
        let mut index = 0;
        while let Some(undecided) = self.undecided_failures.get(index) {
            if let Some(verdict) = self.verdict_on(undecided.failure) {
                _ = self.undecided_failures.swap_remove(index).verdict_sender.send(verdict);
            } else {
                index += 1;
            }
        }
    }

    fn verdict_on(&self, failure: Failure) -> Option<Verdict> {
        // The breaker has opened or paused since: the API did not work.
        if failure.number < self.phase_start {
            return Some(Verdict::LookUpAgain);
        }
        // While the breaker is half-open, the verdict waits: if the breaker opens again, the
        // failure does not count.
        let answered_after = self.answered_up_to > failure.next_number
            || self.answer_count >= failure.enough_answers;
        (self.phase == Phase::Closed && answered_after).then_some(if failure.answered_before {
            Verdict::Counts
        } else {
            Verdict::LookUpAgain
        })
    }
}
