//! Limits how often one log statement logs. During an outage, the same failure repeats with every
//! attempt. This limit keeps the log short, even where the failing code does not limit its own log
//! lines.

use std::collections::HashMap;
use std::fmt;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Lines that were not logged, by reason: `unread` (queue full) or `repeated`.
pub(crate) const DROPPED: &str = "lastseen_log_lines_dropped_total";

/// Maximum number of lines that one statement may log in quick succession.
const BURST: u32 = 20;
/// Time after which a statement that has used up its burst may log one more line.
const INTERVAL: Duration = Duration::from_secs(5);

/// The statements that have logged. Global, because a process has one subscriber. Bounded by the
/// number of statements in the code.
static STATEMENTS: LazyLock<Mutex<HashMap<Identifier, Statement>>> = LazyLock::new(Mutex::default);

/// Drops warnings and errors that repeat too often. Other levels pass: they report progress, or
/// details that an operator has enabled.
pub(crate) struct RepeatFilter;

impl<S: Subscriber> Layer<S> for RepeatFilter {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::WARN {
            return true;
        }
        let mut statements = STATEMENTS.lock();
        let statement = statements.entry(metadata.callsite()).or_insert_with(Statement::new);
        if statement.may_log(Instant::now()) {
            return true;
        }
        if statement.suppressed == 1 {
            event.record(&mut Message(&mut statement.message));
        }
        metrics::counter!(DROPPED, "reason" => "repeated").increment(1);
        false
    }
}

/// Logs how many lines were dropped since the last call.
pub(crate) fn summarize() {
    let mut suppressed = Vec::new();
    for statement in STATEMENTS.lock().values_mut().filter(|statement| statement.suppressed > 0) {
        let count = std::mem::take(&mut statement.suppressed);
        suppressed.push((count, std::mem::take(&mut statement.message)));
    }
    // Logs only after the lock is released, because this filter also handles these lines and takes
    // the lock.
    for (lines, like) in suppressed {
        tracing::warn!(lines, like, "repeated log lines left out");
    }
}

/// A token bucket.
struct Statement {
    tokens: u32,
    refilled: Instant,
    suppressed: u64,
    /// The message of the first dropped line.
    message: String,
}

impl Statement {
    fn new() -> Self {
        Self { tokens: BURST, refilled: Instant::now(), suppressed: 0, message: String::new() }
    }

    fn may_log(&mut self, now: Instant) -> bool {
        let intervals = now.saturating_duration_since(self.refilled).as_secs() / INTERVAL.as_secs();
        if intervals > 0 {
            let gained = u32::try_from(intervals).unwrap_or(BURST);
            self.tokens = self.tokens.saturating_add(gained).min(BURST);
            self.refilled = now;
        }
        if self.tokens == 0 {
            self.suppressed = self.suppressed.saturating_add(1);
            return false;
        }
        self.tokens -= 1;
        true
    }
}

struct Message<'a>(&'a mut String);

impl Visit for Message<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            *self.0 = format!("{value:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field case 2.6.
    #[test]
    fn a_statement_logs_a_burst_and_then_one_line_per_interval() {
        let mut statement = Statement::new();
        let start = statement.refilled;
        let logged =
            |statement: &mut Statement, at| (0..100).filter(|_| statement.may_log(at)).count();
        assert_eq!(logged(&mut statement, start), BURST as usize);
        assert_eq!(logged(&mut statement, start + INTERVAL / 2), 0);
        assert_eq!(logged(&mut statement, start + INTERVAL), 1);
        // 80, 100 and 99 of the three times 100 lines.
        assert_eq!(statement.suppressed, 279);
        assert_eq!(logged(&mut statement, start + INTERVAL * 1_000), BURST as usize);
    }
}
