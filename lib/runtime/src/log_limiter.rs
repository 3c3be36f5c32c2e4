//! Limits how often one kind of event is logged.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Allows one log line per interval, and counts the events that each line reports.
#[derive(Debug)]
pub struct LogLimiter {
    interval: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    unlogged: u64,
    logged_at: Option<Instant>,
}

impl LogLimiter {
    /// Allows the first line at once.
    #[must_use]
    pub fn new(interval: Duration) -> Self {
        Self { interval, state: Mutex::default() }
    }

    /// Counts an event. If a line may be logged now, returns the number of events since the last
    /// line, including this event.
    pub fn count(&self) -> Option<u64> {
        let mut state = self.state.lock();
        state.unlogged = state.unlogged.saturating_add(1);
        if state.logged_at.is_some_and(|at| at.elapsed() < self.interval) {
            return None;
        }
        state.logged_at = Some(Instant::now());
        Some(std::mem::take(&mut state.unlogged))
    }
}
