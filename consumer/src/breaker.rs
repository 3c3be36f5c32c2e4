//! The breaker: how many lookups may run at once, and whose fault it is when one fails.
//!
//! - **Closed**: up to `MAX_CONSUMERS` run, or fewer, with an [adaptive](Concurrency::Adaptive) limit.
//! - **Open**, when nearly all fail: none run but a probe now and then, which is an ordinary lookup.
//! - **Opening up**, after a probe was answered: one runs, and each answer lets a few more.
//! - **Paused**, when the API asked for it: none run until then; after that it opens up as well.
//!
//! A failure counts as an attempt at its message only while the API answers others: one shortly
//! before, and after it one that was asked later, or many. Whatever fails otherwise is looked up again
//! at no cost. A message is given up only if its object is [at fault](evidence), and not an API that fails for
//! a part of all lookups.
//!
//! In whatever phase, no more begin in a second than `MAX_LOOKUPS_PER_SECOND`.
//!
//! Decision: docs/decisions/0026-when-does-a-failed-lookup-count.md

mod adaptive_limit;
mod first_lookups;
mod verdict;
mod rate_limiter;
mod window;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::config::{Concurrency, Lookups};
use crate::resizable_semaphore::{Permit, Room};
use adaptive_limit::{Adaptive, CameTo};
use first_lookups::Evidence;
use rate_limiter::Pace;
use window::Window;

pub(crate) use first_lookups::blames_object;
pub(crate) use verdict::{Failure, Verdict};

/// How many probes may wait for their answers. The next one does not wait for the one before: an API
/// that hangs is asked again before `STATUS_TIMEOUT`, or its recovery would be seen that much later.
const PROBES_MAX: usize = 5;
/// What each answer lets begin while it opens up: the one in its own place, and so many more. Slow
/// answers, of seconds each, still make hundreds of places within 5 s.
const MORE_PER_ANSWER: usize = 7;
/// An answer is shortly before a lookup when it came at most so long before its beginning, or within the
/// time of so many lookups that may begin.
const SHORTLY: Duration = Duration::from_secs(1);
const SHORTLY_LOOKUPS: u32 = 10;
/// The longest and the shortest pause that an API gets by asking for it.
const PAUSE_MAX: Duration = Duration::from_mins(1);
const PAUSE_MIN: Duration = Duration::from_secs(1);

pub(crate) struct Breaker {
    state: watch::Sender<State>,
    places: Arc<Room>,
    pace: Pace,
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
    /// How many may run when the API is well, unless the limit adapts, and how many may now.
    max: usize,
    limit: usize,
    /// The number of the next lookup, and those of the ones that are not answered.
    next: u64,
    unanswered: BTreeSet<u64>,
    outcomes: Window,
    evidence: Evidence,
    adaptive: Option<Adaptive>,
    answered_at: Option<Instant>,
    /// How long after an answer it still tells that the API answers.
    shortly: Duration,
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
    _room: Permit,
}

impl Breaker {
    /// Goes by these settings, until they [change](Self::change_to).
    pub(crate) fn new(lookups: &Lookups) -> Arc<Self> {
        metrics::describe_gauge!(
            "lastseen_breaker_state",
            "Whether lookups are made: 0 closed (all), 1 opening up, 2 paused by the API, 3 open (probes only)."
        );
        metrics::describe_gauge!(
            "lastseen_lookups_limit",
            "How many lookups may run at once, when the status API answers as it should."
        );
        let max = lookups.max_consumers.into();
        let is_adaptive = lookups.concurrency == Concurrency::Adaptive;
        let adaptive = is_adaptive.then(|| Adaptive::new(max));
        let limit = adaptive.as_ref().map_or(max, Adaptive::limit);
        metrics::gauge!("lastseen_lookups_limit").set(gauge(limit));
        let state = State {
            phase: Phase::Closed,
            since: 0,
            max,
            limit,
            next: 0,
            unanswered: BTreeSet::new(),
            outcomes: Window::new(lookups),
            evidence: Evidence::default(),
            adaptive,
            answered_at: None,
            shortly: shortly(lookups),
            answers: 0,
            answered_upto: 0,
        };
        metrics::gauge!("lastseen_breaker_state").set(0);
        Arc::new(Self {
            state: watch::Sender::new(state),
            places: Room::new(limit),
            pace: Pace::new(lookups.max_lookups_per_second),
            status: watch::Sender::new(Ok(())),
        })
    }

    /// Why the API counts as away, while it is open.
    pub(crate) fn status(&self) -> watch::Receiver<Result<(), String>> {
        self.status.subscribe()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.borrow().phase == Phase::Closed
    }

    /// Notes what the first lookup of an object came to.
    pub(crate) fn note_first(&self, id: i64, is_answered: bool) {
        self.state.send_if_modified(|state| {
            state.evidence.note(id, is_answered);
            false
        });
    }

    /// The share of the other objects' first lookups that failed lately.
    pub(crate) fn failing_share(&self, id: i64) -> f64 {
        self.state.borrow().evidence.failing_share(id)
    }

    /// Waits for a place.
    pub(crate) async fn enter(self: &Arc<Self>) -> Place {
        // In this order: a place that is held by who waits for its time could not be taken back, and would
        // be one more lookup in each pause.
        let turn = self.pace.turn().await;
        let room = self.places.enter().await;
        turn.taken();
        self.begin(room)
    }

    /// From now on goes by these settings. Lookups that run go on, and the phase stays.
    pub(crate) fn change_to(&self, lookups: &Lookups) {
        self.pace.change(lookups.max_lookups_per_second);
        let max = lookups.max_consumers.into();
        self.change(|state| {
            state.outcomes.change(lookups);
            state.shortly = shortly(lookups);
            state.max = max;
            if let Some(adaptive) = &mut state.adaptive {
                adaptive.set_max(max, state.next);
            }
            let whole = state.whole_limit();
            metrics::gauge!("lastseen_lookups_limit").set(gauge(whole));
            // While it is open or opens up, it goes on with that.
            if state.phase == Phase::Closed || state.limit > whole {
                self.set_limit(state, whole);
            }
        });
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

    fn begin(self: &Arc<Self>, room: Permit) -> Place {
        let mut number = 0;
        self.state.send_if_modified(|state| {
            number = state.next;
            state.next += 1;
            state.unanswered.insert(number);
            if let Some(adaptive) = &mut state.adaptive {
                adaptive.begins(state.unanswered.len());
            }
            true
        });
        Place { breaker: Arc::clone(self), number, began: Instant::now(), _room: room }
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
                let whole = state.whole_limit();
                if state.limit + MORE_PER_ANSWER < whole {
                    self.set_limit(state, state.limit + MORE_PER_ANSWER);
                } else {
                    tracing::info!("the status API is as before");
                    self.set_limit(state, whole);
                    if let Some(adaptive) = &mut state.adaptive {
                        adaptive.begin_round(state.next);
                    }
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
        if state.phase == Phase::Open && probes + self.places.free() < PROBES_MAX {
            self.places.admit_one();
        }
    }

    /// A lookup has come to an end, of whatever kind. While the API is away that says nothing about how
    /// many it bears: the limit is afterwards as it was before.
    fn adapt(&self, state: &mut State, number: u64, came_to: CameTo) {
        if state.phase != Phase::Closed {
            return;
        }
        let Some(adaptive) = &mut state.adaptive else { return };
        if adaptive.ended(number, came_to, state.next) {
            let limit = adaptive.limit();
            metrics::gauge!("lastseen_lookups_limit").set(gauge(limit));
            self.set_limit(state, limit);
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
        state.outcomes.clear();
        self.set_limit(state, limit);
    }

    fn set_limit(&self, state: &mut State, limit: usize) {
        state.limit = limit;
        self.places.resize(limit);
    }
}

impl State {
    /// How many may run when the API is well.
    fn whole_limit(&self) -> usize {
        self.adaptive.as_ref().map_or(self.max, Adaptive::limit)
    }
}

impl Place {
    /// Gives the place back, and says what the lookup came to.
    pub(crate) fn leave(self, outcome: &Outcome) -> Option<Failure> {
        let (breaker, number) = (Arc::clone(&self.breaker), self.number);
        let failure = breaker.change(|state| {
            state.unanswered.remove(&number);
            let answered_before = state.answered_at.is_some_and(|answered_at| {
                self.began.saturating_duration_since(answered_at) <= state.shortly
            });
            let after = state.next;
            // A quarter of the places, so that at slow answers those that wait for their verdicts leave
            // room for the others, even if four of five fail.
            let enough = state.answers + (state.whole_limit() as u64 / 4).max(1);
            let is_its_own = matches!(outcome, Outcome::FailedAgain(_)) && answered_before;
            let came_to = match outcome {
                Outcome::Answered => CameTo::Answer(self.began.elapsed()),
                Outcome::FailedAgain(_) if is_its_own => CameTo::Nothing,
                _ => CameTo::Failure,
            };
            breaker.adapt(state, number, came_to);
            match outcome {
                Outcome::Answered => {
                    breaker.answered(state, number);
                    return None;
                }
                // It tells about its object, as before, and nothing about the API. Objects that always
                // fail come again with each attempt, and would soon be nearly all there is.
                Outcome::FailedAgain(_) if is_its_own => {}
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
            if state.unanswered.remove(&self.number) {
                self.breaker.adapt(state, self.number, CameTo::Nothing);
            }
        });
    }
}

/// At few lookups per second, the answer before may be seconds old though all is well.
fn shortly(lookups: &Lookups) -> Duration {
    SHORTLY.max(rate_limiter::between(lookups.max_lookups_per_second).saturating_mul(SHORTLY_LOOKUPS))
}

#[expect(clippy::cast_precision_loss, reason = "there are at most 50,000 lookups")]
fn gauge(limit: usize) -> f64 {
    limit as f64
}

#[cfg(test)]
mod tests;
