//! The breaker: limits the lookups in flight, and decides whether the object or the API is at fault
//! when a lookup fails.
//!
//! - **Closed**: up to `MAX_CONSUMERS` lookups run, or fewer with an
//!   [adaptive](Concurrency::Adaptive) limit.
//! - **Open**, because nearly all lookups failed: no lookup runs, except for a probe now and then.
//!   A probe is an ordinary lookup.
//! - **Half-open**, because a probe was answered: one lookup runs, and each answer allows a few
//!   more.
//! - **Paused**, because the API asked for a pause: no lookup runs. After the pause, the breaker is
//!   half-open.
//!
//! A failure counts as an attempt at its message only if there is evidence that the API works: it
//! answered another lookup shortly before the failed one started, and after the failure it answered
//! either one lookup that started later or many that started earlier. After any other failure, the
//! object is looked up again, and no attempt is counted. A message becomes a dead letter only if
//! its object is [at fault](first_lookups), and not if the API fails for a part of all lookups.
//!
//! In every phase, at most `MAX_LOOKUPS_PER_SECOND` lookups start per second.
//!
//! Decision: docs/decisions/0026-when-does-a-failed-lookup-count.md

mod adaptive_limit;
mod first_lookups;
mod lookup_permit;
mod rate_limiter;
mod verdict;
mod window;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, timeout, timeout_at};

use crate::config::{Concurrency, Lookups};
use crate::resizable_semaphore::ResizableSemaphore;
use adaptive_limit::{AdaptiveLimit, Sample};
use first_lookups::FirstLookups;
use rate_limiter::RateLimiter;
use verdict::UndecidedFailure;
use window::Window;

pub(crate) use first_lookups::is_object_at_fault;
pub(crate) use lookup_permit::{LookupPermit, Outcome};
pub(crate) use verdict::Verdict;

/// The most probes in flight. A probe does not wait for the answer of the previous one; otherwise
/// the recovery of an API that hangs would be noticed up to `STATUS_TIMEOUT` later.
const PROBES_MAX: usize = 5;
/// While half-open, each answer raises the limit by this many lookups. Even if answers take
/// seconds, hundreds of lookups are in flight after 5 s.
const RISE_PER_ANSWER: usize = 7;
/// An answer counts as recent at the start of a lookup if it is at most `RECENT` old. At a low rate
/// of lookups, it may be as old as the time in which `RECENT_LOOKUPS` lookups may start.
const RECENT: Duration = Duration::from_secs(1);
const RECENT_LOOKUPS: u32 = 10;
/// A pause is between `PAUSE_MIN` and `PAUSE_MAX` long, whatever the API asks for.
const PAUSE_MAX: Duration = Duration::from_mins(1);
const PAUSE_MIN: Duration = Duration::from_secs(1);

pub(crate) struct Breaker {
    state: Mutex<State>,
    /// Publishes [`State::phase`] whenever it is set.
    phase: watch::Sender<Phase>,
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
    /// The number of the first lookup of this phase. A half-open phase and the closed phase after
    /// it count as one.
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
    undecided_failures: Vec<UndecidedFailure>,
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
        metrics::gauge!("lastseen_lookups_limit").set(as_float(limit));
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
            undecided_failures: Vec::new(),
        };
        metrics::gauge!("lastseen_breaker_state").set(0);
        Arc::new(Self {
            state: Mutex::new(state),
            phase: watch::Sender::new(Phase::Closed),
            permits: ResizableSemaphore::new(limit),
            rate_limiter: RateLimiter::new(lookups.max_lookups_per_second),
            status: watch::Sender::new(Ok(())),
        })
    }

    /// While the breaker is open, this is an error with the reason.
    pub(crate) fn status(&self) -> watch::Receiver<Result<(), String>> {
        self.status.subscribe()
    }

    pub(crate) fn is_closed(&self) -> bool {
        *self.phase.borrow() == Phase::Closed
    }

    pub(crate) fn record_first_lookup(&self, id: i64, is_answered: bool) {
        self.state.lock().first_lookups.record(id, is_answered);
    }

    /// The share of the other objects' recent first lookups that failed.
    pub(crate) fn failing_share(&self, id: i64) -> f64 {
        self.state.lock().first_lookups.failing_share(id)
    }

    pub(crate) async fn acquire(self: &Arc<Self>) -> LookupPermit {
        // Wait for the rate limiter first: a lookup that held a permit during this wait would start
        // even if the API asked for a pause meanwhile.
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
            metrics::gauge!("lastseen_lookups_limit").set(as_float(full_limit));
            // In the other phases, a lower limit applies, which rises to the full limit later.
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
    pub(crate) async fn run(self: Arc<Self>) {
        let mut phases = self.phase.subscribe();
        let mut waits = messaging::amqp::backoff();
        loop {
            let phase = *phases.borrow_and_update();
            let due = match phase {
                Phase::Closed | Phase::HalfOpen => None,
                Phase::Paused { until } => Some(until),
                Phase::Open => {
                    Some(Instant::now() + waits.next().unwrap_or(Duration::from_secs(1)))
                }
            };
            // This cannot fail, because `self` holds the sender.
            let changed = phases.changed();
            let has_changed = match due {
                None => changed.await.is_ok(),
                Some(due) => timeout_at(due, changed).await.is_ok(),
            };
            if has_changed {
                waits = messaging::amqp::backoff();
            } else if phase == Phase::Open {
                self.update(|state| self.allow_probe(state));
            } else {
                self.update(|state| self.end_pause(state));
            }
        }
    }

    /// Changes the state, and reports the verdicts on failures that are known after the change.
    fn update<T>(&self, update: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock();
        let result = update(&mut state);
        state.send_verdicts();
        result
    }

    fn record_answer(&self, state: &mut State, number: u64) {
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
                    self.set_phase(state, Phase::Closed);
                }
            }
        }
    }

    fn record_failure(&self, state: &mut State, number: u64, error: &dyn std::error::Error) {
        if number < state.phase_start || !matches!(state.phase, Phase::Closed | Phase::HalfOpen) {
            return;
        }
        state.outcomes.push(false);
        // Lookups that started earlier and are still in flight may be answered: if half of the
        // lookups fail immediately and the others take seconds, the failures arrive first.
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

    /// Pauses all lookups, because the API has asked lookup `number` to `wait`.
    fn pause(&self, state: &mut State, number: u64, wait: Duration) {
        let until = Instant::now() + wait.clamp(PAUSE_MIN, PAUSE_MAX);
        match state.phase {
            Phase::Paused { until: current } => {
                self.set_phase(state, Phase::Paused { until: until.max(current) });
            }
            _ if number < state.phase_start => {}
            phase => {
                if phase == Phase::HalfOpen {
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

    /// Passes the end of a lookup to the adaptive limit while the breaker is closed. An outage does
    /// not show what load the API sustains, so it must not change the limit.
    fn adapt(&self, state: &mut State, number: u64, sample: Sample) {
        if state.phase != Phase::Closed {
            return;
        }
        let Some(adaptive) = &mut state.adaptive else { return };
        if adaptive.record_end(number, sample, state.next_number) {
            let limit = adaptive.limit();
            metrics::gauge!("lastseen_lookups_limit").set(as_float(limit));
            self.set_limit(state, limit);
        }
    }

    fn enter_phase(&self, state: &mut State, phase: Phase, limit: usize) {
        self.set_phase(state, phase);
        state.phase_start = state.next_number;
        state.outcomes.clear();
        self.set_limit(state, limit);
    }

    fn set_phase(&self, state: &mut State, phase: Phase) {
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
        self.phase.send_replace(phase);
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

/// How old an answer may be to show that the API works: at a low rate of lookups, the latest answer
/// may be seconds old.
fn recent(lookups: &Lookups) -> Duration {
    let interval = rate_limiter::interval(lookups.max_lookups_per_second);
    RECENT.max(interval.saturating_mul(RECENT_LOOKUPS))
}

#[expect(clippy::cast_precision_loss, reason = "there are at most 50,000 lookups")]
fn as_float(limit: usize) -> f64 {
    limit as f64
}

#[cfg(test)]
mod tests;
