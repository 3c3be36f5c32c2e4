//! The status API of a world: fast, with configurable answers, and with a record of the lookups.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use testbed::{Answer, SentHook};

/// Latency of an answer: a tenth of the real API's, so that a case can catch up soon.
const LATENCY_MS: std::ops::Range<u64> = 20..50;

/// The answer to a lookup of an id, instead of the correct one.
type Behaviour = dyn Fn(i64) -> Answer + Send + Sync;

/// A status API like the real one, online for even ids.
pub(crate) struct StatusApi {
    server: testbed::StatusApi,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// `None` for the correct answers.
    behaviour: Mutex<Option<Arc<Behaviour>>>,
    lookups: Mutex<HashMap<i64, Lookups>>,
}

/// The lookups of one id whose answer is "online" or "offline".
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lookups {
    /// The number of lookups. A second one is not due to this API.
    pub(crate) received: u32,
    /// The number of answers that were sent to a client that still waited.
    pub(crate) answered: u32,
    /// The time of the first such answer.
    pub(crate) answered_at: Option<SystemTime>,
}

impl StatusApi {
    pub(crate) fn start() -> Self {
        let state = Arc::new(State::default());
        let state_of_server = Arc::clone(&state);
        Self { server: testbed::StatusApi::start(move |id, _| state_of_server.answer(id)), state }
    }

    /// The value for `TESTER_ENDPOINT`.
    pub(crate) fn endpoint(&self) -> String {
        self.server.endpoint()
    }

    /// Replaces the answers, which still take the usual time. [`correct_answer`] gives the default.
    pub(crate) fn set_behaviour(&self, behaviour: impl Fn(i64) -> Answer + Send + Sync + 'static) {
        *self.state.behaviour.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::new(behaviour));
    }

    /// Restores the correct answers.
    pub(crate) fn reset_behaviour(&self) {
        *self.state.behaviour.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Closes its port and all connections.
    pub(crate) fn stop(&mut self) {
        self.server.stop();
        // A second lookup for an unanswered one is not a repetition.
        for lookups in self.state.lookups().values_mut() {
            lookups.received = lookups.answered;
        }
    }

    /// Listens on the same address again.
    pub(crate) fn restart(&mut self) {
        let state_of_server = Arc::clone(&self.state);
        let address = self.server.address();
        self.server =
            testbed::StatusApi::start_on(address, move |id, _| state_of_server.answer(id));
    }

    /// The number of lookups since the last start, with any answer.
    pub(crate) fn lookup_count(&self) -> usize {
        self.server.lookups().len()
    }

    /// The number of ids with more than `times` lookups since the last start, with any answer.
    pub(crate) fn ids_looked_up_more_than(&self, times: u32) -> usize {
        let mut counts: HashMap<i64, u32> = HashMap::new();
        for (id, _) in self.server.lookups() {
            *counts.entry(id).or_default() += 1;
        }
        counts.values().filter(|count| **count > times).count()
    }

    /// The number of lookups that wait for their answer now.
    pub(crate) fn in_flight(&self) -> usize {
        self.server.in_flight()
    }

    /// The lookups so far, by id.
    pub(crate) fn lookups(&self) -> HashMap<i64, Lookups> {
        self.state.lookups().clone()
    }
}

impl State {
    fn answer(self: &Arc<Self>, id: i64) -> Answer {
        let behaviour = self.behaviour.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut answer = behaviour.map_or_else(|| correct_answer(id), |behaviour| behaviour(id));
        if is_decision(&answer) {
            self.lookups().entry(id).or_default().received += 1;
            let state = Arc::clone(self);
            answer = observed(SentHook::new(move || state.answered(id)), answer);
        }
        let spread = LATENCY_MS.end - LATENCY_MS.start;
        let latency = LATENCY_MS.start + id.unsigned_abs() % spread;
        Answer::After(Duration::from_millis(latency), Box::new(answer))
    }

    fn answered(&self, id: i64) {
        let mut lookups = self.lookups();
        let lookups = lookups.entry(id).or_default();
        lookups.answered += 1;
        lookups.answered_at.get_or_insert_with(SystemTime::now);
    }

    fn lookups(&self) -> MutexGuard<'_, HashMap<i64, Lookups>> {
        self.lookups.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Even ids are online.
pub(crate) fn correct_answer(id: i64) -> Answer {
    if is_online(id) { Answer::Online } else { Answer::Offline }
}

/// Whether the id is online.
pub(crate) fn is_online(id: i64) -> bool {
    id % 2 == 0
}

fn is_decision(answer: &Answer) -> bool {
    match answer {
        Answer::Online | Answer::Offline => true,
        Answer::After(_, later) => is_decision(later),
        _ => false,
    }
}

/// The answer with a hook that runs after all delays.
fn observed(hook: SentHook, answer: Answer) -> Answer {
    match answer {
        Answer::After(delay, later) => Answer::After(delay, Box::new(observed(hook, *later))),
        answer => Answer::Observed(hook, Box::new(answer)),
    }
}
