//! The custom resources: scaling, monitoring, RabbitMQ and Postgres.

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;
use testkit::Scratch;

use super::manifests::{Build, builds, find, list, of_kind, overlay, overlays, selects, text};
use crate::promtool::promtool;

const ALERTS: &str = include_str!("../../../../../observability/alerts.yml");
const RULE: &str =
    include_str!("../../../../../deploy/kubernetes/components/monitoring/prometheus-rule.yaml");
const DASHBOARD: &str =
    include_str!("../../../../../observability/grafana/dashboards/lastseen.json");
const COMPOSE: [&str; 2] = [
    include_str!("../../../../../docker-compose.yml"),
    include_str!("../../../../../docker-compose.cluster.yml"),
];

/// The kinds of custom resources that `docs/kubernetes.md` says a part needs.
const CUSTOM_RESOURCES: [(&str, &[&str]); 3] = [
    ("operators", &["Cluster", "RabbitmqCluster"]),
    ("keda", &["ScaledObject"]),
    ("monitoring", &["PrometheusRule", "ServiceMonitor"]),
];

#[test]
fn each_build_contains_the_custom_resources_of_its_parts() {
    for build in builds() {
        let is_custom = |item: &&Value| {
            let group = text(&item["apiVersion"]);
            group.contains('.') && !group.starts_with("networking.k8s.io")
        };
        let found = build.items.iter().filter(is_custom).map(|item| text(&item["kind"]));
        let parts = CUSTOM_RESOURCES.iter();
        let parts = parts.filter(|(part, _)| build.servers == *part || build.has(part));
        let expected: BTreeSet<&str> = parts.flat_map(|(_, kinds)| *kinds).copied().collect();
        assert_eq!(found.collect::<BTreeSet<_>>(), expected, "{}", build.name);
    }
}

#[test]
fn overlays_contain_what_the_documents_say() {
    let lists = overlays().map(|build| {
        let mut list = vec![build.name.as_str(), &build.servers];
        list.extend(build.components.iter().map(String::as_str));
        list.join(" ")
    });
    let expected = [
        "cron external monitoring routine-cron",
        "managed external",
        "operators operators keda monitoring",
        "strict external-with-roles signed-callbacks",
    ];
    assert_eq!(lists.collect::<Vec<_>>(), expected);
}

#[test]
fn prometheus_rule_contains_the_alerts_of_every_setup() {
    let (_, groups) = ALERTS.split_once("\ngroups:").unwrap();
    let indented: String = format!("groups:{groups}")
        .lines()
        .map(|line| if line.is_empty() { "\n".to_owned() } else { format!("  {line}\n") })
        .collect();
    let (_, spec) = RULE.split_once("\nspec:\n").unwrap();
    assert_eq!(spec, indented, "run scripts/kubernetes-manifests --write-rules");
    for build in builds() {
        for rule in of_kind(&build.items, "PrometheusRule") {
            let mut rules = list(&rule["spec"]["groups"][0]["rules"]).iter();
            // Prometheus cannot scrape a routine that cron runs.
            let is_watched = rules.any(|rule| rule["alert"] == "LastseenRoutineLate");
            assert_eq!(is_watched, !build.has("routine-cron"), "{}", build.name);
        }
    }
}

#[test]
fn dashboard_and_scrape_interval_are_those_of_every_setup() {
    let mut monitored = 0;
    for Build { items, .. } in overlays() {
        for monitor in of_kind(items, "ServiceMonitor") {
            monitored += 1;
            let dashboard = find(items, "ConfigMap", "lastseen-dashboard");
            assert_eq!(dashboard["data"]["lastseen.json"], DASHBOARD);
            let [endpoint] = list(&monitor["spec"]["endpoints"]) else { panic!("{monitor}") };
            assert_eq!(
                (&endpoint["port"], &endpoint["path"]),
                (&"admin".into(), &"/metrics".into())
            );
            let is_scraped = |service: &&Value| {
                selects(&monitor["spec"]["selector"], &service["metadata"]["labels"])
            };
            for service in of_kind(items, "Service").filter(is_scraped) {
                let job = text(&monitor["spec"]["jobLabel"]);
                let is_admin = service["spec"]["ports"][0]["name"] == "admin";
                assert!(!is_admin || service["metadata"]["labels"][job].is_string(), "{service}");
            }
        }
    }
    assert_eq!(monitored, 2);
}

fn scaled_object() -> &'static Value {
    find(&overlay("operators").items, "ScaledObject", "consumer")
}

#[test]
fn consumers_are_scaled_by_age_and_only_by_keda() {
    let spec = &scaled_object()["spec"];
    assert_eq!(spec["scaleTargetRef"]["name"], "consumer");
    // The consumers themselves export the age.
    assert!(spec["minReplicaCount"].as_u64().unwrap() >= 1);
    let consumer = find(&overlay("operators").items, "Deployment", "consumer");
    assert!(consumer["spec"].get("replicas").is_none());
    for trigger in list(&spec["triggers"]) {
        // With `AverageValue`, the age would be divided by the number of consumers.
        assert_eq!(trigger["metricType"], "Value");
    }
}

/// A test of promtool: `query` has the value `expected` while `series` have constant values.
fn query_test(query: &str, series: &[(&str, &str)], expected: &str) -> String {
    let series =
        series.iter().map(|(name, value)| format!("{{series: '{name}', values: '{value}x8'}}"));
    let series = series.collect::<Vec<_>>().join(", ");
    format!(
        "  - interval: 15s\n    input_series: [{series}]\n    promql_expr_test:\n      \
         - {{expr: '{query}', eval_time: 2m, exp_samples: [{{labels: '{{}}', value: {expected}}}]}}\n"
    )
}

/// The number of consumers is multiplied by the result divided by the threshold.
#[test]
fn scaling_queries_add_consumers_by_age_and_keep_busy_ones() {
    let [age, busy] = list(&scaled_object()["spec"]["triggers"]) else {
        panic!("not two triggers")
    };
    let (query, keep) = (text(&age["metadata"]["query"]), text(&age["metadata"]["threshold"]));
    let ages = [
        ("lastseen_oldest_message_age_seconds{pod=\"a\"}", "90"),
        ("lastseen_oldest_message_age_seconds{pod=\"b\"}", "5"),
    ];
    let ready = |value| ("lastseen_ready{role=\"consumer\",pod=\"a\"}", value);
    let not_ready = ("lastseen_ready{role=\"consumer\",pod=\"b\"}", "0");
    let mut tests = String::from("tests:\n");
    tests += &query_test(query, &[ages[0], ages[1], ready("1"), not_ready], "90");
    tests += &query_test(query, &[ages[0], ages[1], ready("0"), not_ready], keep);
    tests += &query_test(query, &[], keep);
    let (query, keep) = (text(&busy["metadata"]["query"]), text(&busy["metadata"]["threshold"]));
    let limits = [
        ("lastseen_lookups_limit{pod=\"a\"}", "100"),
        ("lastseen_lookups_limit{pod=\"b\"}", "100"),
    ];
    let in_flight = |value| ("lastseen_lookups_in_flight{pod=\"a\"}", value);
    let none = ("lastseen_lookups_in_flight{pod=\"b\"}", "0");
    tests += &query_test(query, &[limits[0], limits[1], in_flight("80"), none], "0.4");
    tests += &query_test(query, &[limits[0], limits[1], in_flight("199"), none], keep);
    let folder = Scratch::new("query");
    let file = folder.path().join("test.yml");
    fs::write(&file, tests).unwrap();
    promtool(&["test", "rules", &file.display().to_string()], "");
}

#[test]
fn rabbitmq_is_the_tested_version_and_both_servers_keep_three_copies() {
    let items = &overlay("operators").items;
    let rabbitmq = &find(items, "RabbitmqCluster", "lastseen-rabbitmq")["spec"];
    let image = format!("image: {}\n", text(&rabbitmq["image"]));
    for file in COMPOSE {
        assert!(file.contains(&image), "{image} is not in {file}");
    }
    assert_eq!(rabbitmq["replicas"], 3);
    let postgres = &find(items, "Cluster", "lastseen-postgres")["spec"];
    assert_eq!(postgres["instances"], 3);
    assert_eq!(postgres["postgresql"]["synchronous"]["number"], 1);
}
