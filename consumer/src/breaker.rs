//! The breaker: how many lookups may run at once, and whose fault it is when one fails.
//!
//! - **Closed**: up to `MAX_CONSUMERS` run.
//! - **Open**, when nearly all fail: none run but a probe now and then, which is an ordinary lookup.
//! - **Opening up**, after a probe was answered: one runs, and each answer lets a few more.
//! - **Paused**, when the API asked for it: none run until then; after that it opens up as well.
//!
//! A failure counts as an attempt at its message only while the API answers others: one shortly
//! before, and after it one that was asked later, or many. Whatever fails otherwise is looked up again
//! at no cost.

mod window;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use window::Window;

/// How many probes may wait for their answers. The next one does not wait for the one before: an API
/// that hangs is asked again before `STATUS_TIMEOUT`, or its recovery would be seen that much later.
const PROBES_MAX: usize = 5;
/// What each answer lets begin while it opens up: the one in its own place, and so many more. Slow
/// answers, of seconds each, still make hundreds of places within 5 s.
const MORE_PER_ANSWER: usize = 7;
/// An answer is shortly before a lookup when it came at most so long before its beginning.
const SHORTLY: Duration = Duration::from_secs(1);
/// The longest and the shortest pause that an API gets by asking for it.
const PAUSE_MAX: Duration = Duration::from_mins(1);
const PAUSE_MIN: Duration = Duration::from_secs(1);

pub(crate) struct Breaker {
    state: watch::Sender<State>,
    /// The places for lookups that nobody has taken. Who waits for one is served in order.
    places: Semaphore,
    max: usize,
    status: watch::Sender<Result<(), String>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Closed,
    OpeningUp,
    Paused { until: Instant },
    Open,
}

struct State {
    phase: Phase,
    /// The first lookup of this phase; opening up and closed are one.
    since: u64,
    /// How many places there may be, and how many there are, taken or not.
    limit: usize,
    granted: usize,
    /// The number of the next lookup, and those of the ones that are not answered.
    next: u64,
    unanswered: BTreeSet<u64>,
    outcomes: Window,
    answered_at: Option<Instant>,
    /// How many were answered.
    answers: u64,
    /// The first lookup after the newest that was answered.
    answered_upto: u64,
}

/// What a lookup was told.
pub(crate) enum Outcome<'a> {
    Answered,
    Failed(&'a dyn std::error::Error),
    /// It has failed for an object that failed before while others were answered.
    FailedAgain(&'a dyn std::error::Error),
    /// The API asked to be left alone for so long.
    AskedToWait(Duration),
}

/// A place for one lookup, given back when it is dropped.
pub(crate) struct Place {
    breaker: Arc<Breaker>,
    number: u64,
    began: Instant,
}

/// A lookup that has failed.
pub(crate) struct Failure {
    breaker: Arc<Breaker>,
    number: u64,
    /// A lookup from this number on has begun after the failure.
    after: u64,
    /// With so many answers there are enough, whenever they were asked for. An API that goes away
    /// answers some to its last, but fails more meanwhile than it takes to open.
    enough: u64,
    answered_before: bool,
}

/// Whose fault a failure is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The API answers others, so it is about this object.
    Counts,
    /// The API answers nobody, or it cannot be told.
    LookAgain,
}

impl Breaker {
    /// With up to `max` lookups at once.
    pub(crate) fn new(max: usize) -> Arc<Self> {
        metrics::describe_gauge!(
            "lastseen_breaker_state",
            "Whether lookups are made: 0 closed (all), 1 opening up, 2 paused by the API, 3 open (probes only)."
        );
        let state = State {
            phase: Phase::Closed,
            since: 0,
            limit: max,
            granted: max,
            next: 0,
            unanswered: BTreeSet::new(),
            outcomes: Window::default(),
            answered_at: None,
            answers: 0,
            answered_upto: 0,
        };
        metrics::gauge!("lastseen_breaker_state").set(0);
        let (state, status) = (watch::Sender::new(state), watch::Sender::new(Ok(())));
        Arc::new(Self { state, places: Semaphore::new(max), max, status })
    }

    /// Why the API counts as away, while it is open.
    pub(crate) fn status(&self) -> watch::Receiver<Result<(), String>> {
        self.status.subscribe()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.borrow().phase == Phase::Closed
    }

    /// Waits for a place.
    pub(crate) async fn enter(self: &Arc<Self>) -> Place {
        // It is never closed; and if it were, there would only be no bound.
        if let Ok(place) = self.places.acquire().await {
            place.forget();
        }
        self.begin()
    }

    /// Returns when it has been open for so long without a break.
    pub(crate) async fn stays_open(&self, duration: Duration) {
        let mut status = self.status.subscribe();
        loop {
            // Its sender is here.
            _ = status.wait_for(Result::is_err).await;
            if timeout(duration, status.wait_for(Result::is_ok)).await.is_err() {
                return;
            }
        }
    }

    /// Sends probes while it is open, and ends pauses.
    pub(crate) async fn watch(&self) -> Infallible {
        let mut states = self.state.subscribe();
        let (mut opened, mut waits) = (0, broker::backoff());
        loop {
            let idle = |state: &State| matches!(state.phase, Phase::Closed | Phase::OpeningUp);
            let acting = states.wait_for(|state| !idle(state)).await;
            let acting = acting.ok().map(|state| (state.phase, state.since));
            let Some((phase, since)) = acting else {
                // Its sender is here.
                return std::future::pending().await;
            };
            if let Phase::Paused { until } = phase {
                sleep_until(until).await;
                self.change(|state| self.end_pause(state));
            } else {
                if std::mem::replace(&mut opened, since) != since {
                    waits = broker::backoff();
                }
                sleep(waits.next().unwrap_or(SHORTLY)).await;
                self.change(|state| self.probe(state));
            }
        }
    }

    fn begin(self: &Arc<Self>) -> Place {
        let mut number = 0;
        self.state.send_if_modified(|state| {
            number = state.next;
            state.next += 1;
            state.unanswered.insert(number)
        });
        Place { breaker: Arc::clone(self), number, began: Instant::now() }
    }

    /// Changes the state, and tells everybody.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> Option<T> {
        let mut changed = None;
        self.state.send_modify(|state| changed = Some(change(state)));
        changed
    }

    fn answered(&self, state: &mut State, number: u64) {
        state.answered_at = Some(Instant::now());
        state.answers += 1;
        state.answered_upto = state.answered_upto.max(number + 1);
        // What was asked in an earlier phase says nothing about this one.
        if number < state.since {
            return;
        }
        match state.phase {
            Phase::Paused { .. } => {}
            Phase::Closed => state.outcomes.push(true),
            Phase::Open | Phase::OpeningUp => {
                if state.phase == Phase::Open {
                    tracing::info!("the status API answers again; opening up");
                    self.turn(state, Phase::OpeningUp, 1);
                }
                state.outcomes.push(true);
                if state.limit + MORE_PER_ANSWER < self.max {
                    self.set_limit(state, state.limit + MORE_PER_ANSWER);
                } else {
                    tracing::info!("the status API is as before");
                    self.set_limit(state, self.max);
                    state.phase = Phase::Closed;
                    metrics::gauge!("lastseen_breaker_state").set(0);
                }
            }
        }
    }

    fn failed(&self, state: &mut State, number: u64, error: &dyn std::error::Error) {
        if number < state.since || !matches!(state.phase, Phase::Closed | Phase::OpeningUp) {
            return;
        }
        state.outcomes.push(false);
        // What was asked earlier and has outlived this one may still be answered: when half of the
        // objects fail at once and the others take seconds, the failures come in first.
        let pending = state.unanswered.range(state.since..number).count();
        if state.outcomes.trip(pending) {
            let reason = format!("nearly all lookups fail, the latest: {error}");
            tracing::warn!(reason, "no lookups but probes until the status API answers again");
            self.turn(state, Phase::Open, 0);
            _ = self.status.send_replace(Err(reason));
        }
    }

    fn asked_to_wait(&self, state: &mut State, number: u64, wait: Duration) {
        let until = Instant::now() + wait.clamp(PAUSE_MIN, PAUSE_MAX);
        match &mut state.phase {
            Phase::Paused { until: before } => *before = until.max(*before),
            _ if number < state.since => {}
            before => {
                if *before == Phase::OpeningUp {
                    tracing::debug!(?wait, "the status API asks to wait again");
                } else {
                    tracing::info!(?wait, "the status API asks to wait; no lookups until then");
                }
                self.turn(state, Phase::Paused { until }, 0);
            }
        }
    }

    fn end_pause(&self, state: &mut State) {
        // It may have been prolonged.
        if matches!(state.phase, Phase::Paused { until } if until <= Instant::now()) {
            self.turn(state, Phase::OpeningUp, 1);
        }
    }

    fn probe(&self, state: &mut State) {
        let probes = state.unanswered.range(state.since..).count();
        if state.phase == Phase::Open && probes + self.places.available_permits() < PROBES_MAX {
            state.granted += 1;
            self.places.add_permits(1);
        }
    }

    fn turn(&self, state: &mut State, phase: Phase, limit: usize) {
        if state.phase == Phase::Open {
            _ = self.status.send_replace(Ok(()));
        }
        metrics::gauge!("lastseen_breaker_state").set(match phase {
            Phase::Closed => 0,
            Phase::OpeningUp => 1,
            Phase::Paused { .. } => 2,
            Phase::Open => 3,
        });
        state.phase = phase;
        state.since = state.next;
        state.outcomes = Window::default();
        self.set_limit(state, limit);
    }

    fn set_limit(&self, state: &mut State, limit: usize) {
        state.limit = limit;
        let surplus = state.granted.saturating_sub(limit);
        state.granted -= self.places.forget_permits(surplus);
        self.fill(state);
    }

    fn fill(&self, state: &mut State) {
        let missing = state.limit.saturating_sub(state.granted);
        state.granted += missing;
        self.places.add_permits(missing);
    }
}

impl Place {
    /// Gives the place back, and says what the lookup came to.
    pub(crate) fn leave(self, outcome: &Outcome) -> Option<Failure> {
        let (breaker, number) = (Arc::clone(&self.breaker), self.number);
        let failure = breaker.change(|state| {
            state.unanswered.remove(&number);
            let answered_before =
                state.answered_at.is_some_and(|answered_at| answered_at + SHORTLY >= self.began);
            let after = state.next;
            // A quarter of the places, so that at slow answers those that wait for their verdicts leave
            // room for the others, even if four of five fail.
            let enough = state.answers + (breaker.max as u64 / 4).max(1);
            match outcome {
                Outcome::Answered => {
                    breaker.answered(state, number);
                    return None;
                }
                // It tells about its object, as before, and nothing about the API. Objects that always
                // fail come again with each attempt, and would soon be nearly all there is.
                Outcome::FailedAgain(_) if answered_before => {}
                Outcome::Failed(error) | Outcome::FailedAgain(error) => {
                    breaker.failed(state, number, *error);
                }
                Outcome::AskedToWait(wait) => breaker.asked_to_wait(state, number, *wait),
            }
            let breaker = Arc::clone(&breaker);
            Some(Failure { breaker, number, after, enough, answered_before })
        });
        failure.flatten()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.breaker.change(|state| {
            state.unanswered.remove(&self.number);
            state.granted -= 1;
            self.breaker.fill(state);
        });
    }
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

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use super::*;

    #[tokio::test]
    async fn objects_that_fail_again_and_again_do_not_trip_it_while_others_are_answered() {
        let breaker = Breaker::new(10);
        let error = Error::from(ErrorKind::Other);
        for _ in 0..100 {
            _ = breaker.enter().await.leave(&Outcome::Answered);
            _ = breaker.enter().await.leave(&Outcome::Failed(&error));
            for _ in 0..8 {
                _ = breaker.enter().await.leave(&Outcome::FailedAgain(&error));
            }
        }
        assert!(breaker.is_closed());
    }

    #[tokio::test]
    async fn objects_that_fail_again_trip_it_when_no_other_is_answered() {
        let breaker = Breaker::new(100);
        let error = Error::from(ErrorKind::Other);
        for _ in 0..20 {
            assert!(breaker.is_closed());
            _ = breaker.enter().await.leave(&Outcome::FailedAgain(&error));
        }
        assert!(!breaker.is_closed());
    }
}
