//! What the process itself takes, in metrics. They are read with each scrape, and from what the
//! operating system counts anyway, so that they cost nothing between two.
//!
//! Decision: docs/decisions/0070-how-are-process-metrics-exported.md

use std::fmt::Write as _;
use std::fs;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

/// When it began, in seconds since 1970.
static STARTED_AT: LazyLock<f64> = LazyLock::new(|| {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
});

/// To be called at the start.
pub(crate) fn note_start() {
    LazyLock::force(&STARTED_AT);
}

/// The metrics in Prometheus's text format. Not by the facade: it has counters of whole numbers only,
/// and a second of processor time is much. What the system does not tell is left out, as outside of
/// Linux.
pub(crate) fn render() -> String {
    let mut text = Text::default();
    let processor = clock_gettime(ClockId::ProcessCPUTime);
    #[expect(clippy::cast_precision_loss, reason = "of so many years nobody counts nanoseconds")]
    let seconds = processor.tv_sec as f64 + processor.tv_nsec as f64 / 1e9;
    text.add("cpu_seconds_total", "counter", "Processor time used.", Some(seconds));
    text.add("start_time_seconds", "gauge", "When it began, since 1970.", Some(*STARTED_AT));
    let memory = fs::read_to_string("/proc/self/status").ok();
    let bytes = |field| memory.as_deref().and_then(|status| bytes(status, field));
    text.add("resident_memory_bytes", "gauge", "Memory that it occupies.", bytes("VmRSS:"));
    text.add("virtual_memory_bytes", "gauge", "Memory that it has reserved.", bytes("VmSize:"));
    // One of them is what lists them.
    let open = fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1));
    text.add("open_fds", "gauge", "Files and connections that are open.", open.map(as_float));
    let most = getrlimit(Resource::Nofile).current.and_then(|most| usize::try_from(most).ok());
    text.add("max_fds", "gauge", "Files and connections that may be open.", most.map(as_float));
    text.0
}

/// A field of `/proc/self/status`, which has it in KiB.
fn bytes(status: &str, field: &str) -> Option<f64> {
    let value = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: f64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1_024.0)
}

#[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 files open")]
fn as_float(count: usize) -> f64 {
    count as f64
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn add(&mut self, name: &str, kind: &str, help: &str, value: Option<f64>) {
        let Some(value) = value else { return };
        let name = format!("lastseen_process_{name}");
        // Writing to a text does not fail.
        let _ = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_told_in_bytes() {
        let status = "Name:\tx\nVmSize:\t    2048 kB\nVmRSS:\t     100 kB\n";
        assert_eq!(bytes(status, "VmRSS:"), Some(102_400.0));
        assert_eq!(bytes(status, "VmHWM:"), None);
    }

    #[test]
    fn everything_is_told_here() {
        let text = render();
        for name in ["cpu_seconds_total", "resident_memory_bytes", "open_fds", "max_fds"] {
            let name = format!("\nlastseen_process_{name} ");
            let value = text.split(&name).nth(1).and_then(|rest| rest.lines().next());
            assert!(value.unwrap().parse::<f64>().unwrap() > 0.0, "{text}");
        }
    }
}
