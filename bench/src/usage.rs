//! What a process of ours has used.

use serde::Serialize;
use testbed::Process;

/// What something cost a process.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Cost {
    /// The most memory that it has occupied.
    pub(crate) peak_mb: f64,
    /// Processor time per 100,000 of what was counted.
    pub(crate) cpu_seconds_per_100k: f64,
}

/// Begins at a moment and ends with a [`Cost`].
pub(crate) struct Meter<'a> {
    process: &'a Process,
    cpu_seconds_before: f64,
}

impl<'a> Meter<'a> {
    pub(crate) fn start(process: &'a Process) -> Self {
        Self { process, cpu_seconds_before: cpu_seconds(process) }
    }

    /// The cost of `count` since the start.
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

/// The time that `process` has spent on processors, its own and the kernel's for it.
#[expect(clippy::cast_precision_loss, reason = "no process is that old")]
fn cpu_seconds(process: &Process) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", process.pid()));
    let stat = stat.expect("a process that runs has a stat");
    // What comes before the last bracket is its name, which may hold spaces.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    ticks as f64 / rustix::param::clock_ticks_per_second() as f64
}
