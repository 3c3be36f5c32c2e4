//! The status API of a world: quick, with moods, and with a memory of who was asked for when.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use testbed::{Answer, SentHook};

/// How long an answer takes: a tenth of what the real API takes, so that a case can catch up soon.
const LATENCY_MS: std::ops::Range<u64> = 20..50;

/// The answer to a lookup of an id, instead of the correct one.
type Behaviour = dyn Fn(i64) -> Answer + Send + Sync;

/// A status API like the real one, online for even ids.
pub(crate) struct StatusApi {
    server: testbed::StatusApi,
    day: Arc<State>,
}

#[derive(Default)]
struct State {
    /// `None` on a good day.
    behaviour: Mutex<Option<Arc<Behaviour>>>,
    lookups: Mutex<HashMap<i64, Lookups>>,
}

/// The lookups of one id whose answer is "online" or "offline".
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Lookups {
    /// How often it was asked. If it was again, then for no fault of this API.
    pub(crate) asked: u32,
    /// How often whoever asked was still there when the answer went out.
    pub(crate) answered: u32,
    /// When that was the first time.
    pub(crate) answered_at: Option<SystemTime>,
}

impl StatusApi {
    pub(crate) fn start() -> Self {
        let day = Arc::new(State::default());
        let answering = Arc::clone(&day);
        Self { server: testbed::StatusApi::start(move |id, _| answering.answer(id)), day }
    }

    /// What to set `TESTER_ENDPOINT` to.
    pub(crate) fn endpoint(&self) -> String {
        self.server.endpoint()
    }

    /// Replaces the answers, which still take the usual time. [`correct_answer`] gives the default.
    pub(crate) fn set_behaviour(&self, behaviour: impl Fn(i64) -> Answer + Send + Sync + 'static) {
        *self.day.behaviour.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Arc::new(behaviour));
    }

    /// Restores the correct answers.
    pub(crate) fn reset_behaviour(&self) {
        *self.day.behaviour.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Closes its port and all connections.
    pub(crate) fn stop(&mut self) {
        self.server.stop();
        // What it had not answered yet is to be asked again.
        for lookups in self.day.lookups().values_mut() {
            lookups.asked = lookups.answered;
        }
    }

    /// Listens where it listened before.
    pub(crate) fn restart(&mut self) {
        let answering = Arc::clone(&self.day);
        let address = self.server.address();
        self.server = testbed::StatusApi::start_on(address, move |id, _| answering.answer(id));
    }

    /// How many lookups there have been since it last came up, whatever the answer.
    pub(crate) fn asked(&self) -> usize {
        self.server.lookups().len()
    }

    /// For how many ids it has been asked more than `times` since it last came up, whatever the answer.
    pub(crate) fn ids_looked_up_more_than(&self, times: u32) -> usize {
        let mut counts: HashMap<i64, u32> = HashMap::new();
        for (id, _) in self.server.lookups() {
            *counts.entry(id).or_default() += 1;
        }
        counts.values().filter(|count| **count > times).count()
    }

    /// How many lookups wait for their answer now.
    pub(crate) fn in_flight(&self) -> usize {
        self.server.in_flight()
    }

    /// The lookups so far, by id.
    pub(crate) fn lookups(&self) -> HashMap<i64, Lookups> {
        self.day.lookups().clone()
    }
}

impl State {
    fn answer(self: &Arc<Self>, id: i64) -> Answer {
        let behaviour = self.behaviour.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut answer = behaviour.map_or_else(|| correct_answer(id), |behaviour| behaviour(id));
        if is_decision(&answer) {
            self.lookups().entry(id).or_default().asked += 1;
            let day = Arc::clone(self);
            answer = noted(SentHook::new(move || day.answered(id)), answer);
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

/// The answer, with the note told after all waiting.
fn noted(note: SentHook, answer: Answer) -> Answer {
    match answer {
        Answer::After(delay, later) => Answer::After(delay, Box::new(noted(note, *later))),
        answer => Answer::Observed(note, Box::new(answer)),
    }
}
