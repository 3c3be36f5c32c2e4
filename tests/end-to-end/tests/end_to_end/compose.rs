//! The Compose files, compared with each other and with `.env`.

use std::collections::BTreeSet;

const BASE: &str = include_str!("../../../../docker-compose.yml");
const CLUSTER: &str = include_str!("../../../../docker-compose.cluster.yml");
const DOT_ENV: &str = include_str!("../../../../.env");

/// The names of the services in `file` whose definitions contain `text`.
fn services_with(file: &'static str, text: &str) -> BTreeSet<&'static str> {
    let (_, services) = file.split_once("\nservices:\n").unwrap();
    let (services, _) = services.split_once("\nvolumes:\n").unwrap();
    let mut found = BTreeSet::new();
    let mut service = "";
    for line in services.lines() {
        match line.strip_prefix("  ").and_then(|rest| rest.split_once(':')) {
            Some((name, _)) if !name.starts_with([' ', '#']) => service = name,
            _ => {}
        }
        if line.contains(text) {
            found.insert(service);
        }
    }
    found
}

#[test]
fn each_service_that_uses_the_broker_gets_all_nodes_of_the_cluster() {
    let users_of_broker = services_with(BASE, "*queue");
    assert!(users_of_broker.contains("producer"), "{users_of_broker:?}");
    assert_eq!(services_with(CLUSTER, "*nodes"), users_of_broker);
    let nodes = Vec::from_iter(services_with(CLUSTER, "*member"));
    assert_eq!(nodes.len(), 1, "{nodes:?}");
    let new_nodes = Vec::from_iter(services_with(CLUSTER, "*new-member"));
    let all = [nodes, new_nodes].concat().join(",");
    assert!(CLUSTER.contains(&format!("@{all}/%2f\n")), "AMQP_URI does not name {all}");
}

#[test]
fn no_service_gets_a_secret_of_dot_env_that_it_does_not_need() {
    let (_, own) = BASE.split_once("environment: &own\n").unwrap();
    let (own, _) = own.split_once("\n  # Longer than").unwrap();
    let lines = DOT_ENV.lines().filter(|line| !line.starts_with('#'));
    let names = lines.filter_map(|line| line.split_once('=')).map(|(name, _)| name);
    let is_secret = |name: &&str| name.contains("PASS") || name.contains("COOKIE");
    let secrets: Vec<_> = names.filter(is_secret).collect();
    assert!(secrets.len() >= 8, "{secrets:?}");
    for secret in secrets {
        assert!(own.contains(&format!("    {secret}: \"\"\n")), "{secret} is not empty in &own");
    }
}
