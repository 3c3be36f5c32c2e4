//! A limit on how often one statement logs. What fails fails again with every attempt: the log of an outage stays
//! short, however long it lasts and whatever code has no limit of its own.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

use crate::log_output::DROPPED;

/// Lines that one statement may log in quick succession …
const BURST: u32 = 20;
/// … and the time after which it may log one more.
const INTERVAL: Duration = Duration::from_secs(5);

/// The statements that have logged. There is one subscriber in a process, and a bounded number of statements.
static STATEMENTS: Mutex<Option<HashMap<Identifier, Statement>>> = Mutex::new(None);

/// Drops warnings and errors that repeat too often. Other levels report progress, or the details that somebody asked
/// for.
pub(crate) struct RepeatFilter;

impl<S: Subscriber> Layer<S> for RepeatFilter {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        if *metadata.level() > Level::WARN {
            return true;
        }
        let mut statements = statements();
        let statements = statements.get_or_insert_default();
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

/// Logs how many lines were left out since the last call.
pub(crate) fn summarize() {
    let mut suppressed = Vec::new();
    if let Some(statements) = statements().as_mut() {
        for statement in statements.values_mut().filter(|statement| statement.suppressed > 0) {
            let count = std::mem::take(&mut statement.suppressed);
            suppressed.push((count, std::mem::take(&mut statement.message)));
        }
    }
    // Not before the lock is released: this logs, too.
    for (lines, like) in suppressed {
        tracing::warn!(lines, like, "repeated log lines left out");
    }
}

fn statements() -> MutexGuard<'static, Option<HashMap<Identifier, Statement>>> {
    STATEMENTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A token bucket.
struct Statement {
    tokens: u32,
    refilled: Instant,
    suppressed: u64,
    /// Of the first line that was left out.
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

/// Takes the message out of an event.
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
        assert_eq!(statement.suppressed, 279);
        assert_eq!(logged(&mut statement, start + INTERVAL * 1_000), BURST as usize);
    }
}
