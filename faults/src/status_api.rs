//! The status API of a world: quick, with moods, and with a memory of who was asked for when.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use testbed::Answer;

/// How long an answer takes: a tenth of what the real API takes, so that a case can catch up soon.
const LATENCY_MS: std::ops::Range<u64> = 20..50;

/// What it answers instead of the truth.
type Mood = dyn Fn(i64) -> Answer + Send + Sync;

/// A status API like the real one, online for even ids.
pub(crate) struct StatusApi {
    server: testbed::StatusApi,
    day: Arc<Day>,
}

#[derive(Default)]
struct Day {
    /// `None` on a good day.
    mood: Mutex<Option<Arc<Mood>>>,
    lookups: Mutex<HashMap<i64, Lookups>>,
}

/// The lookups of one id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lookups {
    /// How many were answered "online" or "offline", or would have been if whoever asked had not
    /// gone away.
    pub(crate) decided: u32,
    /// When the first of those came in.
    pub(crate) first_decided_at: Option<SystemTime>,
    /// How many there were, failed ones included.
    pub(crate) all: u32,
}

impl StatusApi {
    pub(crate) fn start() -> Self {
        let day = Arc::new(Day::default());
        let answering = Arc::clone(&day);
        Self { server: testbed::StatusApi::start(move |id, _| answering.answer(id)), day }
    }

    /// What to set `TESTER_ENDPOINT` to.
    pub(crate) fn endpoint(&self) -> String {
        self.server.endpoint()
    }

    /// From now on answers this, after the usual time. [`truth`] is what it should be.
    pub(crate) fn misbehaves(&self, mood: impl Fn(i64) -> Answer + Send + Sync + 'static) {
        *self.day.mood.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(mood));
    }

    /// Answers the truth again.
    pub(crate) fn behaves(&self) {
        *self.day.mood.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Closes its port and all connections.
    pub(crate) fn goes_down(&mut self) {
        self.server.stop();
    }

    /// Listens where it listened before.
    pub(crate) fn comes_back(&mut self) {
        let answering = Arc::clone(&self.day);
        self.server =
            testbed::StatusApi::start_on(self.server.address(), move |id, _| answering.answer(id));
    }

    /// The lookups so far, by id.
    pub(crate) fn lookups(&self) -> HashMap<i64, Lookups> {
        self.day.lookups.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Day {
    fn answer(&self, id: i64) -> Answer {
        let mood = self.mood.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let answer = mood.map_or_else(|| truth(id), |mood| mood(id));
        let mut lookups = self.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        let none = Lookups { decided: 0, first_decided_at: None, all: 0 };
        let lookups = lookups.entry(id).or_insert(none);
        lookups.all += 1;
        if is_decision(&answer) {
            lookups.decided += 1;
            lookups.first_decided_at.get_or_insert_with(SystemTime::now);
        }
        let spread = LATENCY_MS.end - LATENCY_MS.start;
        let latency = LATENCY_MS.start + id.unsigned_abs() % spread;
        Answer::After(Duration::from_millis(latency), Box::new(answer))
    }
}

/// Even ids are online.
pub(crate) fn truth(id: i64) -> Answer {
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
