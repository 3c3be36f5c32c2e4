//! The alerts.

use std::collections::BTreeSet;

use crate::promtool::promtool;

const ALERTS: &str = include_str!("../../../../observability/alerts.yml");
const TESTS: &str = include_str!("../../../../observability/alerts-test.yml");
const RUNBOOK: &str = include_str!("../../../../docs/operations.md");
const DASHBOARD: &str = include_str!("../../../../observability/grafana/dashboards/lastseen.json");

/// The metrics that the alerts and the dashboard query.
pub(crate) fn queried_metrics() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for text in [ALERTS, DASHBOARD] {
        for (at, _) in text.match_indices("lastseen_") {
            let is_part = |letter: char| letter.is_ascii_lowercase() || letter == '_';
            names.insert(text[at..].chars().take_while(|&letter| is_part(letter)).collect());
        }
    }
    names
}

#[test]
fn promtool_accepts_all_rules_and_every_alert_fires() {
    promtool(&["check", "config", "observability/prometheus.yml"], "");
    promtool(&["check", "rules", "--lint=all", "--lint-fatal", "observability/alerts.yml"], "");
    promtool(&["test", "rules", "observability/alerts-test.yml"], "");
}

#[test]
fn every_alert_has_a_test_and_a_runbook_section() {
    let alerts: Vec<&str> =
        ALERTS.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() >= 6, "{alerts:?}");
    let runbook_urls: Vec<&str> =
        ALERTS.lines().filter_map(|line| line.trim().strip_prefix("runbook_url: ")).collect();
    let sections =
        alerts.iter().map(|alert| format!("docs/operations.md#{}", alert.to_lowercase()));
    assert_eq!(runbook_urls, sections.collect::<Vec<_>>());
    for alert in alerts {
        assert!(RUNBOOK.contains(&format!("\n### {alert}\n")), "no section {alert}");
        let fires = TESTS.split("alertname: ").any(|test| {
            test.strip_prefix(alert).is_some_and(|rest| rest.trim_start().starts_with("exp_alerts"))
        });
        assert!(fires, "no test makes {alert} fire");
    }
}
