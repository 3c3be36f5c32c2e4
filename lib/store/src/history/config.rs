//! The setting `HISTORY_RETENTION`.

use std::ops::RangeInclusive;
use std::time::Duration;

use runtime::settings;

const DAY: Duration = Duration::from_hours(24);
const ALLOWED: RangeInclusive<Duration> =
    Duration::from_hours(1)..=Duration::from_hours(24 * 3_650);

/// How long the history is kept.
#[derive(Clone, Copy, Debug, clap::Args)]
#[command(next_help_heading = "History")]
#[group(skip)]
pub struct Retention {
    /// How long to keep the history of when each object was online; 0 for no history
    #[arg(long, value_parser = retention, default_value = "30d")]
    pub history_retention: Duration,
}

impl Retention {
    /// The variables of the settings that can change at run time.
    pub const RELOADABLE: &[&str] = &["HISTORY_RETENTION"];

    /// Whether there is a history.
    #[must_use]
    pub fn is_on(self) -> bool {
        !self.history_retention.is_zero()
    }
}

impl Default for Retention {
    fn default() -> Self {
        Self { history_retention: 30 * DAY }
    }
}

fn retention(text: &str) -> Result<Duration, String> {
    if ["0", "0s", "0d"].contains(&text.trim()) {
        return Ok(Duration::ZERO);
    }
    settings::duration(ALLOWED)(text).map_err(|error| format!("{error}; or 0 for no history"))
}
