//! Writes the log to standard error on a thread of its own, so that an unread pipe or terminal
//! never blocks a service. Lines wait in a bounded queue; when it is full, lines are dropped and
//! counted.
//!
//! Decision: docs/decisions/0067-why-does-the-log-never-block.md

use std::collections::VecDeque;
use std::io::{self, IsTerminal as _, Write};
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::repeat_filter::{self, DROPPED};

const QUEUE_BYTES_MAX: usize = 4 << 20;
/// How often the log reports the number of repeated and dropped lines.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(10);
/// How long the process waits at its end for the log to be written.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Erases the line of the terminal to the right of the cursor.
const ERASE: &[u8] = b"\x1b[K";
/// Makes the terminal truncate a line that is too long instead of wrapping it.
const WRAP_OFF: &[u8] = b"\x1b[?7l";
const WRAP_ON: &[u8] = b"\x1b[?7h";

/// Global, because a process has one standard error.
static OUTPUT: LazyLock<&'static Output> = LazyLock::new(|| {
    let output: &'static Output = Box::leak(Box::default());
    // If the thread cannot start, the queue fills, and further lines are dropped and counted.
    _ = thread::Builder::new().name("log".to_owned()).spawn(|| output.write_all_lines());
    output
});

/// The writer that [`tracing_subscriber`] calls once for each line.
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

/// Whether standard error is a terminal. On a terminal, one status line is shown below the log.
#[must_use]
pub fn is_terminal() -> bool {
    io::stderr().is_terminal()
}

/// Replaces the status line below the log. The terminal truncates `line` to its width, because a
/// wrapped second line could not be erased. The cursor stays at the start of the status line, so
/// that the next log line overwrites it.
pub fn show_status(line: &str) {
    OUTPUT.push(&[WRAP_OFF, line.as_bytes(), ERASE, WRAP_ON, b"\r"].concat());
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
        let mut state = self.state.lock();
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
            self.state.lock().is_writing = false;
            self.changed.notify_all();
        }
    }

    /// Waits for the next line, until `deadline`.
    fn next(&self, deadline: Instant) -> Option<Box<[u8]>> {
        let mut state = self.state.lock();
        while state.lines.is_empty() {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return None;
            }
        }
        let line = state.lines.pop_front()?;
        state.bytes = state.bytes.saturating_sub(line.len());
        state.is_writing = true;
        Some(line)
    }

    fn summarize(&self) {
        let dropped = std::mem::take(&mut self.state.lock().dropped);
        if dropped > 0 {
            tracing::warn!(dropped, "log lines dropped because the log was not read");
        }
        repeat_filter::summarize();
    }

    fn wait_until_written(&self, limit: Duration) {
        let is_unfinished = |state: &mut State| state.is_writing || !state.lines.is_empty();
        self.changed.wait_while_for(&mut self.state.lock(), is_unfinished, limit);
    }
}

/// Writes the line. Ignores errors, because a service must keep running when its terminal or pipe
/// is gone.
fn write(line: &[u8]) {
    let mut stderr = io::stderr().lock();
    if is_terminal() {
        _ = stderr.write_all(ERASE);
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
        assert_eq!(output.state.lock().dropped, 10_000 - queued as u64);
        assert!(output.next(Instant::now()).is_some());
        assert!(output.push(&line));
    }
}
