//! Parses Prometheus's text format, as the services of Lastseen write it.

use std::collections::HashMap;

use metrics::{Key, Label};

/// The counters and gauges in the text by name and labels, and the sums and counts of histograms.
/// Lines that cannot be parsed are skipped.
pub(super) fn samples(text: &str) -> HashMap<Key, f64> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.lines().filter(|line| line.starts_with("lastseen_"));
    lines.filter(|line| !line.contains("_bucket{")).filter_map(sample).collect()
}

/// The services write no timestamps, so the value follows the last space.
fn sample(line: &str) -> Option<(Key, f64)> {
    let (series, value) = line.rsplit_once(' ')?;
    let (name, labels) = match series.split_once('{') {
        Some((name, rest)) => (name, labels(rest)?),
        None => (series, Vec::new()),
    };
    Some((Key::from_parts(name.to_owned(), labels), value.parse().ok()?))
}

/// Parses `key="value",key="value"}`.
fn labels(mut text: &str) -> Option<Vec<Label>> {
    let mut labels = Vec::new();
    while text != "}" {
        let (key, rest) = text.split_once("=\"")?;
        let (value, rest) = unescape(rest)?;
        labels.push(Label::new(key.to_owned(), value));
        text = rest.strip_prefix(',').unwrap_or(rest);
    }
    Some(labels)
}

/// Returns a label's value, and the text after its closing quote.
fn unescape(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.chars();
    loop {
        match characters.next()? {
            '"' => return Some((value, characters.as_str())),
            '\\' => value.push(match characters.next()? {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Field case 1.3
    #[test]
    fn byte_order_mark_before_metrics_is_ignored() {
        let samples = samples("\u{feff}lastseen_dead_letters 5");
        assert!(samples.contains_key(&Key::from_name("lastseen_dead_letters")));
    }

    #[test]
    fn labels_are_unescaped() {
        let line = r#"lastseen_ready{role="a } \"b\", \\ c\n",kind=""} 1.5"#;
        let labels = [("role", "a } \"b\", \\ c\n"), ("kind", "")];
        let key = Key::from_parts("lastseen_ready", &labels);
        assert_eq!(samples(line), HashMap::from([(key, 1.5)]));
    }

    #[test]
    fn comments_buckets_other_metrics_and_malformed_lines_are_skipped() {
        let text = "# HELP lastseen_ready 7\n\
                    lastseen_lookup_seconds_bucket{le=\"0.1\"} 1\n\
                    go_threads 3\n\
                    lastseen_ready{role=\"a\" 1\n\
                    lastseen_ready{role=\"a} 1\n\
                    lastseen_ready{role} 1\n\
                    lastseen_ready{role=\"a\\\n\
                    lastseen_ready one\n\
                    lastseen_ready\n\
                    lastseen_lookup_seconds_count 2\n";
        let count = Key::from_name("lastseen_lookup_seconds_count");
        assert_eq!(samples(text), HashMap::from([(count, 2.0)]));
    }
}
