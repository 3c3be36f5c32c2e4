//! Standard error as the log has it: written by a thread of its own, so that a pipe or a terminal that nobody reads
//! never blocks a service. Lines wait in a bounded queue; those that find no room are dropped and counted.
//!
//! Decision: docs/decisions/0067-why-does-the-log-never-block.md

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::repeat_filter as repeats;
use crate::terminal;

/// What may wait to be written, in bytes.
const WAITING_MAX: usize = 4 << 20;
/// How often repeated and dropped lines are summed up.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(10);
/// How long the end of the process waits for a reader of the log.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Lines that were not logged, by reason: `unread`, or `repeated`.
pub(crate) const DROPPED: &str = "lastseen_log_lines_dropped_total";

/// The process has one standard error.
static OUTPUT: LazyLock<&'static Output> = LazyLock::new(|| {
    let output: &'static Output = Box::leak(Box::default());
    // Without the thread, lines would wait until there is no more room, and be counted.
    _ = thread::Builder::new().name("log".to_owned()).spawn(|| output.write_all_lines());
    output
});

/// What [`tracing_subscriber`] writes to: each write is one line.
pub(crate) struct LogOutput;

impl Write for LogOutput {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !OUTPUT.push(line) {
            metrics::counter!(DROPPED, "reason" => "unread").increment(1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes `text` after the lines that wait, unless nobody reads them.
pub(crate) fn show(text: &[u8]) {
    OUTPUT.push(text);
}

/// Waits until all lines are written, for as long as a reader may reasonably take.
pub(crate) fn flush() {
    repeats::summarize();
    OUTPUT.wait_until_written(FLUSH_TIMEOUT);
}

#[derive(Default)]
struct Output {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    lines: VecDeque<Box<[u8]>>,
    /// Of the lines.
    bytes: usize,
    /// Since the last summary.
    dropped: u64,
    is_writing: bool,
}

impl Output {
    /// Whether there was room for it.
    fn push(&self, line: &[u8]) -> bool {
        let mut state = self.lock();
        if state.bytes.saturating_add(line.len()) > WAITING_MAX {
            state.dropped = state.dropped.saturating_add(1);
            return false;
        }
        state.bytes += line.len();
        state.lines.push_back(line.into());
        drop(state);
        self.changed.notify_all();
        true
    }

    fn write_all_lines(&self) -> ! {
        let mut summary_at = Instant::now() + SUMMARY_INTERVAL;
        loop {
            if Instant::now() >= summary_at {
                summary_at = Instant::now() + SUMMARY_INTERVAL;
                self.summarize();
            }
            let Some(line) = self.next(summary_at) else { continue };
            write(&line);
            self.lock().is_writing = false;
            self.changed.notify_all();
        }
    }

    /// The next line, or none by `deadline`.
    fn next(&self, deadline: Instant) -> Option<Box<[u8]>> {
        let mut state = self.lock();
        while state.lines.is_empty() {
            let wait = deadline.checked_duration_since(Instant::now())?;
            let waited = self.changed.wait_timeout(state, wait);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let line = state.lines.pop_front()?;
        state.bytes = state.bytes.saturating_sub(line.len());
        state.is_writing = true;
        Some(line)
    }

    fn summarize(&self) {
        let dropped = std::mem::take(&mut self.lock().dropped);
        if dropped > 0 {
            tracing::warn!(dropped, "log lines dropped because the log was not read");
        }
        repeats::summarize();
    }

    fn wait_until_written(&self, limit: Duration) {
        let waiting = |state: &mut State| state.is_writing || !state.lines.is_empty();
        drop(self.changed.wait_timeout_while(self.lock(), limit, waiting));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A terminal or a pipe that is gone is no reason to stop.
fn write(line: &[u8]) {
    let mut stderr = io::stderr().lock();
    if terminal::is_there() {
        _ = stderr.write_all(terminal::ERASE);
    }
    _ = stderr.write_all(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field case 2.6.
    #[test]
    fn lines_that_nobody_writes_are_bounded_and_counted() {
        let output = Output::default();
        let line = [b'x'; 1 << 10];
        let taken = (0..10_000).filter(|_| output.push(&line)).count();
        assert_eq!(taken, WAITING_MAX >> 10);
        assert_eq!(output.lock().dropped, 10_000 - taken as u64);
        assert!(output.next(Instant::now()).is_some());
        assert!(output.push(&line));
    }
}
