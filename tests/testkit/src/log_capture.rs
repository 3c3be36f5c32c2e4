//! Captures what the code under test logs.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use parking_lot::Mutex;
use tracing::field::{Field, Visit};
use tracing::subscriber::DefaultGuard;
use tracing::{Dispatch, Level, Subscriber, span};

use crate::wait_until;

/// The lines that the thread of a test has logged since the start of the capture. A line is the
/// text `field=value ` for each field, in quotes if the value is a string.
pub struct LogCapture {
    lines: Lines,
    _guard: DefaultGuard,
    /// With a single subscriber, tracing asks only the thread that first reaches a log statement.
    /// If that thread runs another test, the statement would never log.
    _second: Dispatch,
}

type Lines = Arc<Mutex<Vec<String>>>;

impl LogCapture {
    /// Captures lines of exactly this level whose target starts with `target`.
    pub fn start(level: Level, target: &'static str) -> Self {
        let lines = Lines::default();
        let filter = || Filter { lines: Arc::clone(&lines), level, target };
        let second = Dispatch::new(filter());
        let guard = tracing::subscriber::set_default(filter());
        Self { lines, _guard: guard, _second: second }
    }

    /// The lines that contain `text`.
    pub fn lines_with(&self, text: &str) -> Vec<String> {
        self.lines.lock().iter().filter(|line| line.contains(text)).cloned().collect()
    }

    /// Waits for a line that contains `text`.
    pub async fn wait_for(&self, text: &str) {
        let what = format!("{text:?} is logged");
        wait_until(&what, async || !self.lines_with(text).is_empty()).await;
    }
}

struct Filter {
    lines: Lines,
    level: Level,
    target: &'static str,
}

impl Subscriber for Filter {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == self.level && metadata.target().starts_with(self.target)
    }

    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
                write!(self.0, "{field}={value:?} ").expect("a String accepts any text");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.lines.lock().push(text.0);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}
