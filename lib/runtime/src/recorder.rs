//! The recorder of the process's metrics, and access to their values.
//!
//! Decision: docs/decisions/0070-how-are-metrics-recorded-and-exported.md

mod histogram;
mod registry;
pub(crate) mod text;

use metrics::{Key, SetRecorderError};

use self::registry::Registry;
use crate::process_metrics;
use crate::repeat_filter::DROPPED;

/// Global, because the `metrics` facade allows one recorder in a process.
static REGISTRY: Registry = Registry::new();

/// Installs the recorder of the process's metrics.
pub(crate) fn install(service: &'static str) -> Result<(), SetRecorderError<&'static Registry>> {
    metrics::set_global_recorder(&REGISTRY)?;
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
    Ok(())
}

/// All metrics in Prometheus's text format. `roles` are the roles of the process and whether each
/// is ready.
pub(crate) fn render(roles: &[(&str, bool)]) -> String {
    let mut text = text::render(&REGISTRY);
    push_ready(&mut text, roles);
    process_metrics::push_all(&mut text);
    text
}

/// Appends `lastseen_ready`, which does not use the `metrics` facade, because the facade never
/// removes a label. Until its roles are registered, a process with several roles reports itself as
/// the only role, and the facade would keep reporting that role.
fn push_ready(text: &mut String, roles: &[(&str, bool)]) {
    let help = "Whether the role is ready: 1, or 0.";
    text::push_header(text, "lastseen_ready", "gauge", Some(help));
    for (role, is_ready) in roles {
        let role = format!("role=\"{role}\"");
        text::push_sample(text, "lastseen_ready", &role, u8::from(*is_ready));
    }
    text.push('\n');
}

/// The name, the labels and the current value of each counter and gauge that was recorded in this
/// process. Empty if the process has no recorder.
///
/// `lastseen_ready` and `lastseen_process_…` are missing, because they are not recorded but
/// determined when `/metrics` is requested.
#[must_use]
pub fn metric_values() -> Vec<(Key, f64)> {
    values(&REGISTRY)
}

fn values(registry: &Registry) -> Vec<(Key, f64)> {
    let mut values = Vec::new();
    registry.visit(|key, value| values.extend(value.as_number().map(|value| (key.clone(), value))));
    values
}

/// The value of the counter or gauge that is called `name` in `/metrics`, summed over its label
/// sets; 0 if there is none.
#[must_use]
pub fn metric_total(name: &str) -> f64 {
    total(&REGISTRY, name)
}

fn total(registry: &Registry, name: &str) -> f64 {
    let mut total = 0.0;
    registry.visit(|key, value| {
        if key.name() == name {
            total += value.as_number().unwrap_or_default();
        }
    });
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded() -> Registry {
        let registry = Registry::new();
        metrics::with_local_recorder(&registry, || {
            metrics::counter!("seen_total", "kind" => "a").increment(2);
            metrics::counter!("seen_total", "kind" => "b").increment(3);
            metrics::gauge!("seen_total_rows").set(100);
            metrics::counter!("also_seen_total").increment(200);
            metrics::gauge!("waiting").set(1.5);
            metrics::histogram!("seen_seconds").record(0.3);
        });
        registry
    }

    #[track_caller]
    fn assert_total(name: &str, expected: &str) {
        assert_eq!(total(&recorded(), name).to_string(), expected, "{name}");
    }

    #[test]
    fn total_sums_all_label_sets() {
        assert_total("seen_total", "5");
    }

    #[test]
    fn total_of_a_metric_without_labels_is_its_value() {
        assert_total("waiting", "1.5");
    }

    #[test]
    fn total_of_an_unknown_or_partial_name_is_0() {
        for name in ["absent", "seen", "total", "seen_seconds"] {
            assert_total(name, "0");
        }
    }

    #[test]
    fn values_are_those_of_all_counters_and_gauges() {
        let mut values = values(&recorded());
        values.sort_by(|(one, _), (other, _)| one.cmp(other));
        let labelled = |kind| Key::from_parts("seen_total", &[("kind", kind)]);
        let expected = [
            (Key::from_name("also_seen_total"), 200.0),
            (labelled("a"), 2.0),
            (labelled("b"), 3.0),
            (Key::from_name("seen_total_rows"), 100.0),
            (Key::from_name("waiting"), 1.5),
        ];
        assert_eq!(values, expected);
    }

    #[test]
    fn readiness_of_each_role_is_rendered() {
        let mut text = String::new();
        push_ready(&mut text, &[("producer", true), ("consumer", false)]);
        let expected = "\
# HELP lastseen_ready Whether the role is ready: 1, or 0.
# TYPE lastseen_ready gauge
lastseen_ready{role=\"producer\"} 1
lastseen_ready{role=\"consumer\"} 0

";
        assert_eq!(text, expected);
    }
}
