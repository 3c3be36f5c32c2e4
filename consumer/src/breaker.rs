//! The breaker: limits the lookups in flight, and decides whether the object or the API is at fault
//! when a lookup fails.
//!
//! - **Closed**: up to `MAX_CONSUMERS` lookups run, or fewer with an
//!   [adaptive](Concurrency::Adaptive) limit.
//! - **Open**, because nearly all lookups failed: none run but a probe now and then, which is an
//!   ordinary lookup.
//! - **Half-open**, because a probe was answered: one lookup runs, and each answer allows a few
//!   more.
//! - **Paused**, because the API asked for it: none run. After the pause, the breaker is half-open.
//!
//! A failure counts as an attempt at its message only while the API answers other lookups: one
//! shortly before it, and after it one that started later, or many. After any other failure, the
//! object is looked up again at no cost. A message is given up only if its object is
//! [at fault](first_lookups), and not an API that fails for a part of all lookups.
//!
//! In every phase, at most `MAX_LOOKUPS_PER_SECOND` lookups start per second.
//!
//! Decision: docs/decisions/0026-when-does-a-failed-lookup-count.md

mod adaptive_limit;
mod first_lookups;
mod rate_limiter;
mod verdict;
mod window;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::config::{Concurrency, Lookups};
use crate::resizable_semaphore::{Permit, ResizableSemaphore};
use adaptive_limit::{AdaptiveLimit, Sample};
use first_lookups::FirstLookups;
use rate_limiter::RateLimiter;
use window::Window;

pub(crate) use first_lookups::is_object_at_fault;
pub(crate) use verdict::{Failure, Verdict};

/// The most probes in flight. A probe does not wait for the answer of the previous one; otherwise
/// the recovery of an API that hangs would be noticed up to `STATUS_TIMEOUT` later.
const PROBES_MAX: usize = 5;
/// While half-open, each answer raises the limit by this many lookups. Even with answers that take
/// seconds, hundreds of lookups run after 5 s.
const RISE_PER_ANSWER: usize = 7;
/// An answer is recent at the start of a lookup if it is at most this old, or at most as old as the
/// time in which this many lookups may start.
const RECENT: Duration = Duration::from_secs(1);
const RECENT_LOOKUPS: u32 = 10;
/// The limits of a pause that the API asks for.
const PAUSE_MAX: Duration = Duration::from_mins(1);
const PAUSE_MIN: Duration = Duration::from_secs(1);

pub(crate) struct Breaker {
    state: watch::Sender<State>,
    permits: Arc<ResizableSemaphore>,
    rate_limiter: RateLimiter,
    status: watch::Sender<Result<(), String>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Closed,
    HalfOpen,
    Paused { until: Instant },
    Open,
}

struct State {
    phase: Phase,
    /// The number of the first lookup of this phase. Half-open and the closed phase after it count
    /// as one.
    phase_start: u64,
    /// The fixed limit on lookups when the API works. Unused if the limit is adaptive.
    max: usize,
    /// The limit that applies now.
    limit: usize,
    next_number: u64,
    /// The numbers of the lookups in flight.
    in_flight: BTreeSet<u64>,
    outcomes: Window,
    first_lookups: FirstLookups,
    adaptive: Option<AdaptiveLimit>,
    last_answer_at: Option<Instant>,
    /// How old an answer may be to show that the API works.
    recent: Duration,
    answer_count: u64,
    /// One more than the highest number of a lookup that was answered.
    answered_up_to: u64,
}

/// The outcome of a lookup, as far as it concerns the API.
pub(crate) enum Outcome<'a> {
    Answered,
    Failed(&'a dyn std::error::Error),
    /// The lookup failed for an object whose earlier failures have counted.
    FailedAgain(&'a dyn std::error::Error),
    /// The API asked for a pause of this length.
    AskedToWait(Duration),
}

/// Allows one lookup. Dropping it releases it without an outcome.
pub(crate) struct LookupPermit {
    breaker: Arc<Breaker>,
    number: u64,
    started: Instant,
    _permit: Permit,
}

impl Breaker {
    pub(crate) fn new(lookups: &Lookups) -> Arc<Self> {
        metrics::describe_gauge!(
            "lastseen_breaker_state",
            "Breaker state: 0 closed, 1 half-open, 2 paused by the API, 3 open (probes only)."
        );
        metrics::describe_gauge!(
            "lastseen_lookups_limit",
            "Limit on lookups in flight while the status API works."
        );
        let max = lookups.max_consumers.into();
        let is_adaptive = lookups.concurrency == Concurrency::Adaptive;
        let adaptive = is_adaptive.then(|| AdaptiveLimit::new(max));
        let limit = adaptive.as_ref().map_or(max, AdaptiveLimit::limit);
        metrics::gauge!("lastseen_lookups_limit").set(gauge(limit));
        let state = State {
            phase: Phase::Closed,
            phase_start: 0,
            max,
            limit,
            next_number: 0,
            in_flight: BTreeSet::new(),
            outcomes: Window::new(lookups),
            first_lookups: FirstLookups::default(),
            adaptive,
            last_answer_at: None,
            recent: recent(lookups),
            answer_count: 0,
            answered_up_to: 0,
        };
        metrics::gauge!("lastseen_breaker_state").set(0);
        Arc::new(Self {
            state: watch::Sender::new(state),
            permits: ResizableSemaphore::new(limit),
            rate_limiter: RateLimiter::new(lookups.max_lookups_per_second),
            status: watch::Sender::new(Ok(())),
        })
    }

    /// An error while the breaker is open, with the reason.
    pub(crate) fn status(&self) -> watch::Receiver<Result<(), String>> {
        self.status.subscribe()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.state.borrow().phase == Phase::Closed
    }

    /// Notes whether the first lookup of an object was answered.
    pub(crate) fn note_first_lookup(&self, id: i64, is_answered: bool) {
        self.state.send_if_modified(|state| {
            state.first_lookups.note(id, is_answered);
            false
        });
    }

    /// The share of the other objects' recent first lookups that failed.
    pub(crate) fn failing_share(&self, id: i64) -> f64 {
        self.state.borrow().first_lookups.failing_share(id)
    }

    /// Waits until a lookup may start.
    pub(crate) async fn acquire(self: &Arc<Self>) -> LookupPermit {
        // In this order, because a permit that is held while it waits for the rate limiter could
        // not be taken back, and each pause would have one more lookup.
        let slot = self.rate_limiter.wait().await;
        let permit = self.permits.acquire().await;
        slot.consume();
        self.start_lookup(permit)
    }

    /// Applies changed settings. Lookups in flight continue, and the phase stays the same.
    pub(crate) fn apply_settings(&self, lookups: &Lookups) {
        self.rate_limiter.set_rate(lookups.max_lookups_per_second);
        let max = lookups.max_consumers.into();
        self.update(|state| {
            state.outcomes.apply_settings(lookups);
            state.recent = recent(lookups);
            state.max = max;
            if let Some(adaptive) = &mut state.adaptive {
                adaptive.set_max(max, state.next_number);
            }
            let full_limit = state.full_limit();
            metrics::gauge!("lastseen_lookups_limit").set(gauge(full_limit));
            // In the other phases, a lower limit applies, which rises to this one later.
            if state.phase == Phase::Closed || state.limit > full_limit {
                self.set_limit(state, full_limit);
            }
        });
    }

    /// Returns when the breaker has been open for `duration` without interruption.
    pub(crate) async fn stays_open(&self, duration: Duration) {
        let mut status = self.status.subscribe();
        loop {
            // This cannot fail, because `self` holds the sender.
            _ = status.wait_for(Result::is_err).await;
            if timeout(duration, status.wait_for(Result::is_ok)).await.is_err() {
                return;
            }
        }
    }

    /// Allows probes while the breaker is open, and ends pauses.
    pub(crate) async fn run(&self) -> Infallible {
        let mut states = self.state.subscribe();
        let (mut opened, mut waits) = (0, broker::backoff());
        loop {
            let is_idle = |state: &State| matches!(state.phase, Phase::Closed | Phase::HalfOpen);
            let state = states.wait_for(|state| !is_idle(state)).await;
            let state = state.ok().map(|state| (state.phase, state.phase_start));
            let Some((phase, phase_start)) = state else {
                // Unreachable, because `self` holds the sender.
                return std::future::pending().await;
            };
            if let Phase::Paused { until } = phase {
                sleep_until(until).await;
                self.update(|state| self.end_pause(state));
            } else {
                if std::mem::replace(&mut opened, phase_start) != phase_start {
                    waits = broker::backoff();
                }
                sleep(waits.next().unwrap_or(Duration::from_secs(1))).await;
                self.update(|state| self.allow_probe(state));
            }
        }
    }

    fn start_lookup(self: &Arc<Self>, permit: Permit) -> LookupPermit {
        let mut number = 0;
        self.state.send_if_modified(|state| {
            number = state.next_number;
            state.next_number += 1;
            state.in_flight.insert(number);
            if let Some(adaptive) = &mut state.adaptive {
                adaptive.note_start(state.in_flight.len());
            }
            true
        });
        let started = Instant::now();
        LookupPermit { breaker: Arc::clone(self), number, started, _permit: permit }
    }

    /// Changes the state, and notifies its subscribers.
    fn update<T>(&self, update: impl FnOnce(&mut State) -> T) -> Option<T> {
        let mut result = None;
        self.state.send_modify(|state| result = Some(update(state)));
        result
    }

    fn answered(&self, state: &mut State, number: u64) {
        state.last_answer_at = Some(Instant::now());
        state.answer_count += 1;
        state.answered_up_to = state.answered_up_to.max(number + 1);
        // A lookup from an earlier phase says nothing about this one.
        if number < state.phase_start {
            return;
        }
        match state.phase {
            Phase::Paused { .. } => {}
            Phase::Closed => state.outcomes.push(true),
            Phase::Open | Phase::HalfOpen => {
                if state.phase == Phase::Open {
                    tracing::info!(
                        "the status API answered a probe; starting more lookups with each answer"
                    );
                    self.enter_phase(state, Phase::HalfOpen, 1);
                }
                state.outcomes.push(true);
                let full_limit = state.full_limit();
                if state.limit + RISE_PER_ANSWER < full_limit {
                    self.set_limit(state, state.limit + RISE_PER_ANSWER);
                } else {
                    tracing::info!("the status API works again; lookups run without restriction");
                    self.set_limit(state, full_limit);
                    if let Some(adaptive) = &mut state.adaptive {
                        adaptive.begin_round(state.next_number);
                    }
                    state.phase = Phase::Closed;
                    metrics::gauge!("lastseen_breaker_state").set(0);
                }
            }
        }
    }

    fn failed(&self, state: &mut State, number: u64, error: &dyn std::error::Error) {
        if number < state.phase_start || !matches!(state.phase, Phase::Closed | Phase::HalfOpen) {
            return;
        }
        state.outcomes.push(false);
        // Lookups that started earlier and are still in flight may be answered: if half of the
        // objects fail at once and the others take seconds, the failures arrive first.
        let earlier = state.in_flight.range(state.phase_start..number).count();
        if state.outcomes.should_open(earlier) {
            let reason = format!("nearly all lookups fail, the latest: {error}");
            tracing::warn!(
                reason,
                "only probing the status API until it answers; deliveries wait and lose no attempt"
            );
            self.enter_phase(state, Phase::Open, 0);
            _ = self.status.send_replace(Err(reason));
        }
    }

    fn asked_to_wait(&self, state: &mut State, number: u64, wait: Duration) {
        let until = Instant::now() + wait.clamp(PAUSE_MIN, PAUSE_MAX);
        match &mut state.phase {
            Phase::Paused { until: current } => *current = until.max(*current),
            _ if number < state.phase_start => {}
            phase => {
                if *phase == Phase::HalfOpen {
                    tracing::debug!(?wait, "the status API asked for another pause");
                } else {
                    tracing::info!(?wait, "the status API asked for a pause; lookups wait");
                }
                self.enter_phase(state, Phase::Paused { until }, 0);
            }
        }
    }

    fn end_pause(&self, state: &mut State) {
        // The pause may have been prolonged.
        if matches!(state.phase, Phase::Paused { until } if until <= Instant::now()) {
            self.enter_phase(state, Phase::HalfOpen, 1);
        }
    }

    fn allow_probe(&self, state: &mut State) {
        let probes = state.in_flight.range(state.phase_start..).count();
        if state.phase == Phase::Open && probes + self.permits.available() < PROBES_MAX {
            self.permits.add_excess_permit();
        }
    }

    /// Passes the end of a lookup to the adaptive limit. Only while closed: an outage says nothing
    /// about the load that the API sustains, so the limit is the same after it.
    fn adapt(&self, state: &mut State, number: u64, sample: Sample) {
        if state.phase != Phase::Closed {
            return;
        }
        let Some(adaptive) = &mut state.adaptive else { return };
        if adaptive.note_end(number, sample, state.next_number) {
            let limit = adaptive.limit();
            metrics::gauge!("lastseen_lookups_limit").set(gauge(limit));
            self.set_limit(state, limit);
        }
    }

    fn enter_phase(&self, state: &mut State, phase: Phase, limit: usize) {
        if state.phase == Phase::Open {
            _ = self.status.send_replace(Ok(()));
        }
        metrics::gauge!("lastseen_breaker_state").set(match phase {
            Phase::Closed => 0,
            Phase::HalfOpen => 1,
            Phase::Paused { .. } => 2,
            Phase::Open => 3,
        });
        state.phase = phase;
        state.phase_start = state.next_number;
        state.outcomes.clear();
        self.set_limit(state, limit);
    }

    fn set_limit(&self, state: &mut State, limit: usize) {
        state.limit = limit;
        self.permits.resize(limit);
    }
}

impl State {
    /// The limit on lookups in flight while the API works.
    fn full_limit(&self) -> usize {
        self.adaptive.as_ref().map_or(self.max, AdaptiveLimit::limit)
    }
}

impl LookupPermit {
    /// Releases the permit with the outcome of the lookup. Returns the failure, if it is one.
    pub(crate) fn complete(self, outcome: &Outcome) -> Option<Failure> {
        let (breaker, number) = (Arc::clone(&self.breaker), self.number);
        let failure = breaker.update(|state| {
            state.in_flight.remove(&number);
            let answered_before = state.last_answer_at.is_some_and(|answered_at| {
                self.started.saturating_duration_since(answered_at) <= state.recent
            });
            let next_number = state.next_number;
            // A quarter of the limit: even if four of five lookups fail and answers are slow, the
            // failures that wait for their verdicts leave permits for other lookups.
            let enough_answers = state.answer_count + (state.full_limit() as u64 / 4).max(1);
            // Such a failure only says again that its object fails, and nothing about the API.
            // Objects that always fail return with each attempt, and would soon be nearly all
            // lookups.
            let is_objects_fault = matches!(outcome, Outcome::FailedAgain(_)) && answered_before;
            let sample = match outcome {
                Outcome::Answered => Sample::Answer(self.started.elapsed()),
                Outcome::FailedAgain(_) if is_objects_fault => Sample::Ignored,
                _ => Sample::Failure,
            };
            breaker.adapt(state, number, sample);
            match outcome {
                Outcome::Answered => {
                    breaker.answered(state, number);
                    return None;
                }
                Outcome::FailedAgain(_) if is_objects_fault => {}
                Outcome::Failed(error) | Outcome::FailedAgain(error) => {
                    breaker.failed(state, number, *error);
                }
                Outcome::AskedToWait(wait) => breaker.asked_to_wait(state, number, *wait),
            }
            let breaker = Arc::clone(&breaker);
            Some(Failure { breaker, number, next_number, enough_answers, answered_before })
        });
        failure.flatten()
    }
}

impl Drop for LookupPermit {
    fn drop(&mut self) {
        self.breaker.update(|state| {
            if state.in_flight.remove(&self.number) {
                self.breaker.adapt(state, self.number, Sample::Ignored);
            }
        });
    }
}

/// At a low rate of lookups, the latest answer may be seconds old although the API works.
fn recent(lookups: &Lookups) -> Duration {
    let interval = rate_limiter::interval(lookups.max_lookups_per_second);
    RECENT.max(interval.saturating_mul(RECENT_LOOKUPS))
}

#[expect(clippy::cast_precision_loss, reason = "there are at most 50,000 lookups")]
fn gauge(limit: usize) -> f64 {
    limit as f64
}

#[cfg(test)]
mod tests;
