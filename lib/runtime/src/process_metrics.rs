//! Metrics of the process itself: processor time, memory and files. They come from counters of the
//! operating system and are read only when `/metrics` is requested.
//!
//! Decision: docs/decisions/0070-how-are-metrics-recorded-and-exported.md

use std::fs;
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

use crate::recorder::text::{push_header, push_sample};

/// Start time of the process, in seconds since 1970.
static STARTED_AT: LazyLock<f64> = LazyLock::new(|| {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
});

/// Records the start time. Must be called when the process starts.
pub(crate) fn record_start() {
    LazyLock::force(&STARTED_AT);
}

/// Appends the metrics in Prometheus's text format. Counters of the `metrics` facade are integers,
/// which are too coarse for seconds of processor time, so this module does not use the facade.
/// Metrics that the operating system does not provide are omitted; outside Linux, that applies to
/// memory and open files.
pub(crate) fn push_all(text: &mut String) {
    let processor = clock_gettime(ClockId::ProcessCPUTime);
    #[expect(clippy::cast_precision_loss, reason = "exact for the first 285 million years")]
    let seconds = processor.tv_sec as f64 + processor.tv_nsec as f64 / 1e9;
    push(text, "cpu_seconds_total", "counter", "Processor time used.", Some(seconds));
    push(text, "start_time_seconds", "gauge", "Start time, since 1970.", Some(*STARTED_AT));
    let memory = fs::read_to_string("/proc/self/status").ok();
    let bytes = |field| memory.as_deref().and_then(|status| bytes(status, field));
    push(text, "resident_memory_bytes", "gauge", "Resident memory.", bytes("VmRSS:"));
    push(text, "virtual_memory_bytes", "gauge", "Reserved memory.", bytes("VmSize:"));
    // Subtracts the descriptor with which the directory itself is read.
    let open = fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1));
    push(text, "open_fds", "gauge", "Open files and connections.", open.map(as_float));
    let limit = getrlimit(Resource::Nofile).current.and_then(|limit| usize::try_from(limit).ok());
    push(text, "max_fds", "gauge", "Limit of open files and connections.", limit.map(as_float));
}

fn push(text: &mut String, name: &str, kind: &str, help: &str, value: Option<f64>) {
    let Some(value) = value else { return };
    let name = format!("lastseen_process_{name}");
    push_header(text, &name, kind, Some(help));
    push_sample(text, &name, "", value);
    text.push('\n');
}

/// Reads a field of `/proc/self/status`, which is in KiB there, and converts it to bytes.
fn bytes(status: &str, field: &str) -> Option<f64> {
    let value = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: f64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1_024.0)
}

#[expect(clippy::cast_precision_loss, reason = "a process has far fewer than 2^52 open files")]
fn as_float(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reported_in_bytes() {
        let status = "Name:\tx\nVmSize:\t    2048 kB\nVmRSS:\t     100 kB\n";
        assert_eq!(bytes(status, "VmRSS:"), Some(102_400.0));
        assert_eq!(bytes(status, "VmHWM:"), None);
    }

    #[test]
    fn every_process_metric_is_reported() {
        let mut text = String::new();
        push_all(&mut text);
        for name in ["cpu_seconds_total", "resident_memory_bytes", "open_fds", "max_fds"] {
            let name = format!("\nlastseen_process_{name} ");
            let value = text.split(&name).nth(1).and_then(|rest| rest.lines().next());
            assert!(value.unwrap().parse::<f64>().unwrap() > 0.0, "{text}");
        }
    }
}
