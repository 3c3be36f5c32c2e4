//! The recorder of the process's metrics, and access to their values.

use std::fmt::Write as _;
use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::process_metrics;
use crate::repeat_filter::DROPPED;

/// Upper bounds of every `_seconds` histogram: from a fast commit to a very slow status API.
const SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0];
/// Upper bounds of the time from a callback to the commit, which after an outage may be hours.
const SECONDS_TO_COMMIT: [f64; 14] =
    [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0, 86_400.0];
/// Upper bounds of every `_rows` histogram.
const ROWS: [f64; 8] = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 10_000.0];

/// Global, because the `metrics` facade allows one recorder in a process.
static INSTALLED: OnceLock<PrometheusHandle> = OnceLock::new();

/// Installs the process's metrics recorder and returns a handle that renders the metrics.
pub(crate) fn install(service: &'static str) -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .set_buckets_for_metric(
            Matcher::Suffix("_to_commit_seconds".to_owned()),
            &SECONDS_TO_COMMIT,
        )?
        .set_buckets_for_metric(Matcher::Suffix("_rows".to_owned()), &ROWS)?
        .install_recorder()?;
    metrics::describe_gauge!(
        "lastseen_build_info",
        "Always 1; the labels name service and version."
    );
    metrics::gauge!("lastseen_build_info", "service" => service, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    metrics::describe_counter!(
        DROPPED,
        "Log lines that were dropped, by reason: the log was not read, or the lines repeated."
    );
    for reason in ["unread", "repeated"] {
        metrics::counter!(DROPPED, "reason" => reason).increment(0);
    }
    process_metrics::record_start();
    Ok(INSTALLED.get_or_init(|| handle).clone())
}

/// All metrics in Prometheus's text format. `roles` are the roles of the process and whether each
/// is ready.
pub(crate) fn render(handle: &PrometheusHandle, roles: &[(&str, bool)]) -> String {
    handle.render() + &render_ready(roles) + &process_metrics::render()
}

/// Renders `lastseen_ready` without the `metrics` facade, because the facade never removes a label.
/// Until its roles are registered, a process with several roles reports itself as the only role,
/// and the facade would keep reporting that role.
fn render_ready(roles: &[(&str, bool)]) -> String {
    let mut text = "# HELP lastseen_ready Whether the role is ready: 1, or 0.\n\
                    # TYPE lastseen_ready gauge\n"
        .to_owned();
    for (role, is_ready) in roles {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "lastseen_ready{{role=\"{role}\"}} {}", u8::from(*is_ready));
    }
    text + "\n"
}

/// Moves recorded samples into their buckets every few seconds, so that histograms stay small even
/// without scrapes.
pub(crate) async fn upkeep(handle: PrometheusHandle) {
    let mut interval = tokio::time::interval(Duration::from_secs(5));
    loop {
        interval.tick().await;
        handle.run_upkeep();
    }
}

/// All metrics that were recorded in this process, in the text format of `/metrics`; empty if no
/// recorder is installed.
#[must_use]
pub fn render_metrics() -> String {
    INSTALLED.get().map_or_else(String::new, PrometheusHandle::render)
}

/// The value of the counter or gauge that is called `name` in `/metrics`, summed over its label
/// sets; 0 if there is none.
///
/// This renders all metrics, as a scrape does, so it is too slow for a busy loop.
#[must_use]
pub fn metric_total(name: &str) -> f64 {
    INSTALLED.get().map_or(0.0, |metrics| total(&metrics.render(), name))
}

/// Sums the samples called `name` in Prometheus's text format. The exporter writes no timestamps,
/// so the value follows the last space.
fn total(rendered: &str, name: &str) -> f64 {
    let samples = rendered.lines().filter_map(|line| {
        let rest = line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' ']))?;
        rest.rsplit(' ').next()?.parse::<f64>().ok()
    });
    // `sum` of no samples would be -0.
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
    fn total_sums_all_label_sets() {
        assert_total("seen_total", "5");
    }

    #[test]
    fn total_of_a_sample_without_labels_is_its_value() {
        assert_total("waiting", "1.5");
    }

    #[test]
    fn total_of_an_unknown_or_partial_name_is_0() {
        for name in ["absent", "seen", "total", "seen_seconds"] {
            assert_total(name, "0");
        }
    }
}
