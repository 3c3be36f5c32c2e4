//! Writes the log to standard error on a thread of its own, so that an unread pipe or terminal
//! never blocks a service. Lines wait in a bounded queue; when it is full, lines are dropped and
//! counted.
//!
//! Decision: docs/decisions/0067-why-does-the-log-never-block.md

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::repeat_filter;
use crate::terminal;

/// The maximum size of the queue, in bytes.
const QUEUE_BYTES_MAX: usize = 4 << 20;
/// How often the log reports the number of repeated and dropped lines.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(10);
/// How long the process waits at its end for the log to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Lines that were not logged, by reason: `unread` (queue full) or `repeated`.
pub(crate) const DROPPED: &str = "lastseen_log_lines_dropped_total";

/// Global, because a process has one standard error.
static OUTPUT: LazyLock<&'static Output> = LazyLock::new(|| {
    let output: &'static Output = Box::leak(Box::default());
    // If the thread cannot start, the queue fills, and further lines are dropped and counted.
    _ = thread::Builder::new().name("log".to_owned()).spawn(|| output.write_all_lines());
    output
});

/// The writer of [`tracing_subscriber`], which writes one line with each call.
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

/// Writes `text` after the queued lines, or drops it if the queue is full.
pub(crate) fn write_text(text: &[u8]) {
    OUTPUT.push(text);
}

/// Waits until all lines are written, for at most [`FLUSH_TIMEOUT`].
pub(crate) fn flush() {
    repeat_filter::summarize();
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
    /// The total size of the lines.
    bytes: usize,
    /// Lines dropped since the last summary.
    dropped: u64,
    is_writing: bool,
}

impl Output {
    /// Queues the line, or returns `false` if the queue is full.
    fn push(&self, line: &[u8]) -> bool {
        let mut state = self.lock();
        if state.bytes.saturating_add(line.len()) > QUEUE_BYTES_MAX {
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

    /// Waits for the next line, until `deadline`.
    fn next(&self, deadline: Instant) -> Option<Box<[u8]>> {
        let mut state = self.lock();
        while state.lines.is_empty() {
            let wait = deadline.checked_duration_since(Instant::now())?;
            let notified = self.changed.wait_timeout(state, wait);
            (state, _) = notified.unwrap_or_else(PoisonError::into_inner);
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
        repeat_filter::summarize();
    }

    fn wait_until_written(&self, limit: Duration) {
        let is_unfinished = |state: &mut State| state.is_writing || !state.lines.is_empty();
        drop(self.changed.wait_timeout_while(self.lock(), limit, is_unfinished));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ignores errors: a service keeps running when its terminal or pipe is gone.
fn write(line: &[u8]) {
    let mut stderr = io::stderr().lock();
    if terminal::is_attached() {
        _ = stderr.write_all(terminal::ERASE);
    }
    _ = stderr.write_all(line);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field case 2.6.
    #[test]
    fn full_queue_drops_and_counts_lines() {
        let output = Output::default();
        let line = [b'x'; 1 << 10];
        let queued = (0..10_000).filter(|_| output.push(&line)).count();
        assert_eq!(queued, QUEUE_BYTES_MAX >> 10);
        assert_eq!(output.lock().dropped, 10_000 - queued as u64);
        assert!(output.next(Instant::now()).is_some());
        assert!(output.push(&line));
    }
}
