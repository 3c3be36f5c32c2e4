//! The results of a load run.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use hdrhistogram::{CreationError, Histogram, RecordError};
use indicatif::{HumanCount, HumanFloatCount};
use serde::Serialize;

use crate::callback::Outcome;

/// Latencies are recorded with three significant digits, from one microsecond up.
const SIGNIFICANT_DIGITS: u8 = 3;

/// The counts and latencies of one worker. The tallies of all workers are added up.
pub(crate) struct Tally {
    pub(crate) sent: u64,
    accepted: u64,
    other: u64,
    unanswered: u64,
    failed: u64,
    statuses: BTreeMap<u16, u64>,
    latencies_us: Histogram<u64>,
}

impl Tally {
    pub(crate) fn new() -> Result<Self, CreationError> {
        Ok(Self {
            sent: 0,
            accepted: 0,
            other: 0,
            unanswered: 0,
            failed: 0,
            statuses: BTreeMap::new(),
            latencies_us: Histogram::new(SIGNIFICANT_DIGITS)?,
        })
    }

    /// Counts one callback. The latencies include an unanswered callback with the time until it was
    /// given up, because otherwise the slowest callbacks would be missing. They exclude a failed
    /// callback, because a connection that is refused quickly would lower them.
    pub(crate) fn record(
        &mut self,
        outcome: &Outcome,
        latency: Duration,
    ) -> Result<(), RecordError> {
        self.sent += 1;
        match outcome {
            Outcome::Accepted(status) | Outcome::Refused(status) => {
                *self.statuses.entry(status.as_u16()).or_default() += 1;
            }
            Outcome::Unanswered | Outcome::Failed(_) => {}
        }
        match outcome {
            Outcome::Accepted(_) => self.accepted += 1,
            Outcome::Refused(_) => self.other += 1,
            Outcome::Unanswered => self.unanswered += 1,
            Outcome::Failed(_) => {
                self.failed += 1;
                return Ok(());
            }
        }
        self.latencies_us.record(u64::try_from(latency.as_micros()).unwrap_or(u64::MAX))
    }

    pub(crate) fn add(&mut self, other: &Self) -> anyhow::Result<()> {
        self.sent += other.sent;
        self.accepted += other.accepted;
        self.other += other.other;
        self.unanswered += other.unanswered;
        self.failed += other.failed;
        for (status, count) in &other.statuses {
            *self.statuses.entry(*status).or_default() += count;
        }
        self.latencies_us.add(&other.latencies_us)?;
        Ok(())
    }

    /// The report of a run that took `elapsed`, had `ids` ids in each callback and left `unsent`
    /// callbacks that were due.
    pub(crate) fn report(self, elapsed: Duration, ids: u32, unsent: u64) -> Report {
        let seconds = elapsed.as_secs_f64();
        let callbacks_per_second =
            if seconds > 0.0 { approximate(self.accepted) / seconds } else { 0.0 };
        let at = |quantile| milliseconds(self.latencies_us.value_at_quantile(quantile));
        Report {
            sent: self.sent,
            accepted: self.accepted,
            other: self.other,
            unanswered: self.unanswered,
            failed: self.failed,
            unsent,
            seconds,
            callbacks_per_second,
            ids_per_second: callbacks_per_second * f64::from(ids),
            latency_ms: Latency {
                p50: at(0.5),
                p90: at(0.9),
                p99: at(0.99),
                p999: at(0.999),
                max: milliseconds(self.latencies_us.max()),
            },
            statuses: self.statuses,
        }
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a count above 2^53 is out of reach, and is shown rounded"
)]
pub(crate) fn approximate(count: u64) -> f64 {
    count as f64
}

fn milliseconds(microseconds: u64) -> f64 {
    approximate(microseconds) / 1_000.0
}

/// The results of a load run, as text for people or as JSON for programs.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Callbacks sent: the sum of the next four.
    pub sent: u64,
    /// Answered 2xx.
    pub accepted: u64,
    /// Answered with another status.
    pub other: u64,
    /// Not answered within the client's timeout.
    pub unanswered: u64,
    /// Not answered because the connection was refused, or ended before the response.
    pub failed: u64,
    /// Due but never sent, because all connections waited for responses until the end. Unless this
    /// is 0, the true latencies at this rate are higher than those reported.
    pub unsent: u64,
    /// Seconds from the first callback to the last response.
    pub seconds: f64,
    /// Callbacks answered 2xx, per second.
    pub callbacks_per_second: f64,
    /// Ids in these callbacks, per second.
    pub ids_per_second: f64,
    /// Response times, unanswered callbacks included.
    pub latency_ms: Latency,
    /// The number of responses with each status.
    pub statuses: BTreeMap<u16, u64>,
}

/// Latencies in milliseconds. With a rate, they count from when a callback was due, otherwise from
/// when it was sent.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Latency {
    /// The median.
    pub p50: f64,
    /// The 90th percentile.
    pub p90: f64,
    /// The 99th percentile.
    pub p99: f64,
    /// The 99.9th percentile.
    pub p999: f64,
    /// The maximum.
    pub max: f64,
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut count = |name, value, note: &str| {
            let line = format!("{name:<12}{:>14}  {note}", HumanCount(value).to_string());
            writeln!(out, "{}", line.trim_end())
        };
        let speed = format!(
            "{}/s, {} ids/s",
            HumanFloatCount(tenths(self.callbacks_per_second)),
            HumanFloatCount(tenths(self.ids_per_second))
        );
        let statuses: Vec<String> = self
            .statuses
            .iter()
            .filter(|(status, _)| !(200..300).contains(*status))
            .map(|(status, count)| format!("{status}: {}", HumanCount(*count)))
            .collect();
        count("sent", self.sent, &format!("in {:.1} s", self.seconds))?;
        count("accepted", self.accepted, &speed)?;
        count("other", self.other, &statuses.join(", "))?;
        count("unanswered", self.unanswered, "given up after CALLBACK_TIMEOUT")?;
        count("failed", self.failed, "refused or broken connections")?;
        count("unsent", self.unsent, "due, but no connection was free")?;
        let Latency { p50, p90, p99, p999, max } = self.latency_ms;
        write!(
            out,
            "{:<12}p50 {p50:.1}  p90 {p90:.1}  p99 {p99:.1}  p99.9 {p999:.1}  max {max:.1}",
            "latency ms"
        )
    }
}

fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}
