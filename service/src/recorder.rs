//! The process's metrics: what is recorded, and how much of it there is.

use std::fmt::Write as _;
use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::log_output::DROPPED;
use crate::process_metrics as process;

/// Upper bounds of every `_seconds` histogram: from a fast commit to a status API at its slowest.
const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
/// Upper bounds of the time from a callback to the commit, which after an outage may be hours.
const SECONDS_TO_COMMIT: [f64; 14] =
    [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0, 86_400.0];
/// Upper bounds of every `_rows` histogram.
const ROWS: [f64; 8] = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 10_000.0];

/// The recorder of this process, which the `metrics` facade has only one of.
static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the process's metrics recorder; the handle renders it.
///
/// # Errors
/// When a recorder is installed already.
pub(crate) fn install(service: &'static str) -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(
            Matcher::Suffix("_to_commit_seconds".to_owned()),
            &SECONDS_TO_COMMIT,
        )?
        .set_buckets_for_metric(Matcher::Suffix("_rows".to_owned()), &ROWS)?
        .install_recorder()?;
    metrics::describe_gauge!("lastseen_build_info", "Always 1; the labels say what runs.");
    metrics::gauge!("lastseen_build_info", "service" => service, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    metrics::describe_counter!(
        DROPPED,
        "Log lines that were left out, by reason: nobody read the log, or they repeated."
    );
    for reason in ["unread", "repeated"] {
        metrics::counter!(DROPPED, "reason" => reason).increment(0);
    }
    process::note_start();
    Ok(INSTALLED.get_or_init(|| handle).clone())
}

/// All metrics of a process with these roles, each of which is ready or is not, in Prometheus's text
/// format.
pub(crate) fn render(handle: &PrometheusHandle, roles: &[(&str, bool)]) -> String {
    handle.render() + &render_ready(roles) + &process::render()
}

/// Not by the facade, which would keep a role for ever that is told only until there are others.
fn render_ready(roles: &[(&str, bool)]) -> String {
    let mut text = "# HELP lastseen_ready Whether the role is ready: 1, or 0.\n\
                    # TYPE lastseen_ready gauge\n"
        .to_owned();
    for (role, is_ready) in roles {
        // Writing to a text does not fail.
        let _ = writeln!(text, "lastseen_ready{{role=\"{role}\"}} {}", u8::from(*is_ready));
    }
    text + "\n"
}

/// Moves recorded samples into their buckets every few seconds, so that histograms stay small when
/// nobody scrapes.
pub(crate) async fn upkeep(handle: PrometheusHandle) {
    let mut interval = tokio::time::interval(Duration::from_secs(5));
    loop {
        interval.tick().await;
        handle.run_upkeep();
    }
}

/// All metrics that were recorded in this process, as `/metrics` shows them; nothing if it has none.
#[must_use]
pub fn rendered_metrics() -> String {
    INSTALLED.get().map_or_else(String::new, PrometheusHandle::render)
}

/// What a counter or gauge of this process stands at, all its label sets together, by the name that
/// it has in `/metrics`; 0 if there is none.
///
/// It renders all metrics, as a scrape does: nothing for a loop without a wait.
#[must_use]
pub fn metric_total(name: &str) -> f64 {
    INSTALLED.get().map_or(0.0, |metrics| total(&metrics.render(), name))
}

/// Sums up the samples called `name` in a text of Prometheus's format. The exporter writes no
/// timestamps, so the value is what follows the last space.
fn total(rendered: &str, name: &str) -> f64 {
    let samples = rendered.lines().filter_map(|line| {
        let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']))?;
        rest.rsplit(' ').next()?.parse::<f64>().ok()
    });
    // Not `sum`, which makes -0 of nothing.
    samples.fold(0.0, |total, sample| total + sample)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RENDERED: &str = r#"
# HELP seen_total Objects: seen_total 1000
# TYPE seen_total counter
seen_total{kind="a"} 2
seen_total{kind="b",reason="a brace } and a space 70"} 3

# TYPE seen_total_rows gauge
seen_total_rows 100
# TYPE also_seen_total counter
also_seen_total 200

# TYPE waiting gauge
waiting 1.5

# TYPE seen_seconds histogram
seen_seconds_bucket{le="0.1"} 4
seen_seconds_sum 0.3
"#;

    #[track_caller]
    fn assert_total(name: &str, expected: &str) {
        assert_eq!(total(RENDERED, name).to_string(), expected, "{name}");
    }

    #[test]
    fn the_samples_of_all_label_sets_add_up() {
        assert_total("seen_total", "5");
    }

    #[test]
    fn a_sample_without_labels_is_the_total() {
        assert_total("waiting", "1.5");
    }

    #[test]
    fn what_is_not_there_or_only_part_of_a_name_is_0() {
        for name in ["absent", "seen", "total", "seen_seconds"] {
            assert_total(name, "0");
        }
    }
}
