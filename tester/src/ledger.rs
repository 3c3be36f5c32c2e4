//! The ledger of a load run: the outcome of each callback, one JSON object per line.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::callback::Outcome;

/// A line of the ledger: one callback.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// When the callback was due, by this machine's clock, in microseconds since 1970.
    pub due_unix_us: u64,
    /// How late the callback was sent, because the load generator had no processor time or no free
    /// connection.
    pub late_us: u64,
    /// Time from when the callback was due to the end of its response, or until it was given up or
    /// failed.
    pub latency_us: u64,
    /// The response.
    pub answer: Answer,
    /// The ids in the callback.
    pub ids: Vec<i64>,
}

/// The response to a callback, or its absence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// A complete response with this status.
    Status(u16),
    /// No response within `CALLBACK_TIMEOUT`.
    Timeout,
    /// The connection could not be made, or ended before the response; with the reason.
    Failed(String),
}

/// A file of [`Entry`] lines. Each outcome is written as soon as it is known, so that the file is
/// complete up to the moment at which the process is killed.
pub(crate) struct Ledger {
    file: File,
    /// The start of the run by the monotonic clock, and the same moment as the time since 1970.
    start: (Instant, Duration),
}

impl Ledger {
    /// Creates the file. It must not exist, so that no run overwrites the ledger of another one.
    pub(crate) fn create(path: &Path, start: Instant) -> io::Result<Self> {
        let file = File::options().append(true).create_new(true).open(path)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
        Ok(Self { file, start: (start, now.saturating_sub(start.elapsed())) })
    }

    pub(crate) fn write(&self, entry: &Entry) -> io::Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        // One write per line to a file opened for appending, so that lines of several workers do
        // not mix.
        (&self.file).write_all(&line)
    }

    fn unix_time(&self, at: Instant) -> Duration {
        let (start, unix) = self.start;
        unix + at.saturating_duration_since(start)
    }
}

impl Entry {
    pub(crate) fn new(
        ledger: &Ledger,
        due_at: Instant,
        sent_at: Instant,
        latency: Duration,
        outcome: &Outcome,
        ids: Vec<i64>,
    ) -> Self {
        let answer = match outcome {
            Outcome::Accepted(status) | Outcome::Refused(status) => Answer::Status(status.as_u16()),
            Outcome::Unanswered => Answer::Timeout,
            // The root cause, such as "connection refused"; reqwest's own text is only "error
            // sending request".
            Outcome::Failed(error) => {
                let root_cause = anyhow::Chain::new(error).last();
                Answer::Failed(root_cause.map(ToString::to_string).unwrap_or_default())
            }
        };
        Self {
            due_unix_us: microseconds(ledger.unix_time(due_at)),
            late_us: microseconds(sent_at.saturating_duration_since(due_at)),
            latency_us: microseconds(latency),
            answer,
            ids,
        }
    }
}

fn microseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
