//! The memory and processor time of a process.

use serde::Serialize;
use testkit::Process;

/// The cost of some work of a process.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Cost {
    /// Peak of the resident memory.
    pub(crate) peak_mb: f64,
    /// Processor time per 100,000 units of work.
    pub(crate) cpu_seconds_per_100k: f64,
}

/// Measures the [`Cost`] from [`Meter::start`] on.
pub(crate) struct Meter<'a> {
    process: &'a Process,
    cpu_seconds_before: f64,
}

impl<'a> Meter<'a> {
    pub(crate) fn start(process: &'a Process) -> Self {
        Self { process, cpu_seconds_before: cpu_seconds(process) }
    }

    /// The cost of `count` units of work since the start.
    pub(crate) fn cost_of(&self, count: f64) -> Cost {
        let used = cpu_seconds(self.process) - self.cpu_seconds_before;
        Cost {
            peak_mb: megabytes(self.process.peak_rss_kib()),
            cpu_seconds_per_100k: used / count * 100_000.0,
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "no memory is that large")]
pub(crate) fn megabytes(kib: u64) -> f64 {
    kib as f64 * 1_024.0 / 1e6
}

/// The processor time of `process`, in user and kernel mode.
#[expect(clippy::cast_precision_loss, reason = "no process is that old")]
fn cpu_seconds(process: &Process) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()));
    let stat = stat.expect("a running process has a stat file");
    // The name before the last parenthesis may contain spaces.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}
