//! The dashboard, tested with a running system and a real Prometheus.

use std::collections::BTreeSet;
use std::time::Instant;

use serde_json::Value;
use testkit::{
    Database, PATIENCE, Process, Prometheus, Queue, System, callback_endpoint, eventually,
    free_port,
};

const DASHBOARD: &str = include_str!("../../../../observability/grafana/dashboards/lastseen.json");
const DATASOURCE: &str =
    include_str!("../../../../observability/grafana/provisioning/datasources/prometheus.yml");
/// The configuration for docker-compose.yml, which finds the services by their names in the
/// network.
const PROMETHEUS: &str = include_str!("../../../../observability/prometheus.yml");
const ALERTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../observability/alerts.yml");

/// The titles and queries of all panels, without row headings.
fn panels() -> Vec<(String, Vec<String>)> {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "two panels have one id");
    panels
        .iter()
        .filter(|panel| panel["type"] != "row")
        .map(|panel| {
            let targets = panel["targets"].as_array().unwrap();
            let queries = targets.iter().map(|target| {
                let uid = target["datasource"]["uid"].as_str().unwrap();
                assert!(DATASOURCE.contains(&format!("uid: {uid}\n")), "{target}");
                let query = target["expr"].as_str().unwrap();
                // Otherwise a query of other metrics could pass.
                assert!(query.contains("lastseen_"), "{query}");
                // Grafana inserts at least four times the scrape interval.
                query.replace("$__rate_interval", "1m")
            });
            (panel["title"].as_str().unwrap().to_owned(), queries.collect())
        })
        .collect()
}

/// Starts Prometheus with the configuration of docker-compose.yml, and the addresses of `services`.
async fn prometheus(services: &[(&str, &Process)]) -> Prometheus {
    let mut config = PROMETHEUS.replace("alerts.yml]", &format!("{ALERTS}]"));
    for (name, service) in services {
        let admin = service.admin().await;
        let job = format!("- job_name: {name}\n");
        let (before, after) = config.split_once(&job).expect(name);
        let (_, others) = after.split_once('\n').unwrap();
        config = format!("{before}{job}    static_configs: [{{targets: ['{admin}']}}]\n{others}");
    }
    Prometheus::start(&config).await
}

/// Whether the response contains at least one finite value.
fn has_data(answer: &str) -> bool {
    let answer: Value = serde_json::from_str(answer).unwrap();
    let samples = answer["data"]["result"].as_array().unwrap();
    let values = samples.iter().filter_map(|sample| sample["value"][1].as_str()?.parse().ok());
    values.filter(|value: &f64| value.is_finite()).count() > 0
}

#[tokio::test]
async fn every_dashboard_panel_has_data_within_a_minute() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let tester_port = free_port();
    let system = System::new(&queue, &database, &format!("http://127.0.0.1:{tester_port}"));
    let producer = system.spawn("producer", &[]);
    let consumer = system.spawn("consumer", &[]);
    let routine = system.spawn("routine", &[]);
    let viewer = system.spawn("viewer", &[]);
    let endpoint = callback_endpoint(&producer).await;
    let address = format!("127.0.0.1:{tester_port}");
    let tester = system.spawn(
        "tester",
        &[("TESTER_ADDR", address.as_str()), ("CALLBACK_ENDPOINT", endpoint.as_str())],
    );
    let services = [
        ("producer", &producer),
        ("consumer", &consumer),
        ("routine", &routine),
        ("viewer", &viewer),
        ("tester", &tester),
    ];
    let started = Instant::now();
    let prometheus = prometheus(&services).await;
    assert!(!has_data(&prometheus.query("lastseen_nonexistent_metric").await));
    let panels = panels();
    assert!(panels.len() > 20, "{panels:?}");
    for (title, queries) in panels {
        assert!(!queries.is_empty(), "{title}");
        for query in queries {
            let what = format!("{title} has data by {query}");
            let remaining = PATIENCE.saturating_sub(started.elapsed());
            eventually(&what, remaining, async || {
                has_data(&prometheus.query(&query).await).then_some(())
            })
            .await;
        }
    }
}
