//! Prometheus's text format, version 0.0.4.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter, Write as _};

use metrics::{Key, KeyName};

use super::registry::{Registry, Value};

/// All metrics with one name.
struct Family {
    kind: &'static str,
    /// The lines of each metric, by its labels.
    lines: BTreeMap<String, String>,
}

/// Renders all metrics, sorted by name and labels.
pub(super) fn render(registry: &Registry) -> String {
    let mut families: BTreeMap<KeyName, Family> = BTreeMap::new();
    registry.visit(|key, value| {
        let new = || Family { kind: kind(&value), lines: BTreeMap::new() };
        let family = families.entry(key.name_shared()).or_insert_with(new);
        let labels = labels(key);
        let mut lines = String::new();
        push_metric(&mut lines, key.name(), &labels, &value);
        family.lines.insert(labels, lines);
    });
    let mut text = String::new();
    for (name, family) in &families {
        let help = registry.description(name.as_str());
        push_header(&mut text, name.as_str(), family.kind, help.as_deref());
        text.extend(family.lines.values().map(String::as_str));
        text.push('\n');
    }
    text
}

/// Appends the lines that precede the samples of a metric.
pub(crate) fn push_header(text: &mut String, name: &str, kind: &str, help: Option<&str>) {
    if let Some(help) = help {
        let help = help.replace('\\', r"\\").replace('\n', r"\n");
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}");
    }
    let _ = writeln!(text, "# TYPE {name} {kind}");
}

/// Appends a sample. `labels` have the form `key="value",key="value"`.
pub(crate) fn push_sample(text: &mut String, name: &str, labels: &str, value: impl Display) {
    // Writing to a String cannot fail.
    let _ = if labels.is_empty() {
        writeln!(text, "{name} {value}")
    } else {
        writeln!(text, "{name}{{{labels}}} {value}")
    };
}

fn kind(value: &Value<'_>) -> &'static str {
    match value {
        Value::Counter(_) => "counter",
        Value::Gauge(_) => "gauge",
        Value::Histogram(_) => "histogram",
    }
}

fn labels(key: &Key) -> String {
    let labels = key.labels().map(|label| {
        let value = label.value().replace('\\', r"\\").replace('\n', r"\n").replace('"', r#"\""#);
        format!("{}=\"{value}\"", label.key())
    });
    labels.collect::<Vec<_>>().join(",")
}

fn push_metric(text: &mut String, name: &str, labels: &str, value: &Value<'_>) {
    match value {
        Value::Counter(count) => push_sample(text, name, labels, count),
        Value::Gauge(value) => push_sample(text, name, labels, Number(*value)),
        Value::Histogram(histogram) => {
            let comma = if labels.is_empty() { "" } else { "," };
            let mut total = 0;
            for (bound, count) in histogram.buckets() {
                let labels = format!("{labels}{comma}le=\"{}\"", Number(bound));
                push_sample(text, &format!("{name}_bucket"), &labels, count);
                total = count;
            }
            push_sample(text, &format!("{name}_sum"), labels, Number(histogram.sum()));
            push_sample(text, &format!("{name}_count"), labels, total);
        }
    }
}

/// A value as Prometheus writes it. Rust writes the infinite ones differently.
struct Number(f64);

impl Display for Number {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        if self.0.is_infinite() {
            formatter.write_str(if self.0 > 0.0 { "+Inf" } else { "-Inf" })
        } else {
            self.0.fmt(formatter)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(record: impl FnOnce()) -> String {
        let registry = Registry::new();
        metrics::with_local_recorder(&registry, record);
        render(&registry)
    }

    #[test]
    fn metrics_are_sorted_by_name_and_labels() {
        let text = rendered(|| {
            metrics::describe_gauge!("waiting", "Objects that wait.");
            metrics::describe_gauge!("waiting", "A second description is ignored.");
            metrics::describe_gauge!("absent", "Described, but never set.");
            metrics::gauge!("waiting").set(1.5);
            metrics::counter!("seen_total", "kind" => "b").increment(u64::MAX);
            metrics::counter!("seen_total", "kind" => "a", "file" => "x").increment(2);
        });
        let expected = "\
# TYPE seen_total counter
seen_total{kind=\"a\",file=\"x\"} 2
seen_total{kind=\"b\"} 18446744073709551615

# HELP waiting Objects that wait.
# TYPE waiting gauge
waiting 1.5

";
        assert_eq!(text, expected);
    }

    #[test]
    fn histogram_is_rendered_with_buckets_sum_and_count() {
        let text = rendered(|| {
            metrics::histogram!("batch_rows", "file" => "x").record(2.5);
            metrics::histogram!("batch_rows", "file" => "x").record(20_000.0);
            metrics::histogram!("lookup_seconds").record(0.002);
        });
        let first = "\
# TYPE batch_rows histogram
batch_rows_bucket{file=\"x\",le=\"1\"} 0
batch_rows_bucket{file=\"x\",le=\"3\"} 1
batch_rows_bucket{file=\"x\",le=\"10\"} 1
";
        let last = "\
batch_rows_bucket{file=\"x\",le=\"10000\"} 1
batch_rows_bucket{file=\"x\",le=\"+Inf\"} 2
batch_rows_sum{file=\"x\"} 20002.5
batch_rows_count{file=\"x\"} 2

# TYPE lookup_seconds histogram
lookup_seconds_bucket{le=\"0.001\"} 0
lookup_seconds_bucket{le=\"0.0025\"} 1
";
        assert!(text.starts_with(first) && text.contains(last), "{text}");
        assert!(text.ends_with("lookup_seconds_sum 0.002\nlookup_seconds_count 1\n\n"), "{text}");
    }

    #[test]
    fn label_values_and_descriptions_are_escaped() {
        let text = rendered(|| {
            metrics::describe_gauge!("path", "A \\ and a \"quote\"\nin two lines.");
            metrics::gauge!("path", "path" => "C:\\new \"x\"\n").set(1);
        });
        let expected = r#"# HELP path A \\ and a "quote"\nin two lines.
# TYPE path gauge
path{path="C:\\new \"x\"\n"} 1

"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn values_without_digits_are_those_of_prometheus() {
        let rendered = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN, 1e9, 0.1]
            .map(|value| Number(value).to_string());
        assert_eq!(rendered, ["+Inf", "-Inf", "NaN", "1000000000", "0.1"]);
    }
}
