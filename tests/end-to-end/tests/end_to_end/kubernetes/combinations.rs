//! Every combination of servers and components that `docs/kubernetes.md` allows can run.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::manifests::{
    Build, Workload, builds, folders, is_refused, list, of_kind, pairs, run_script, selects, text,
    workloads, write_overlay,
};

const GUIDE: &str = include_str!("../../../../../docs/kubernetes.md");
const OPERATIONS: &str = include_str!("../../../../../docs/operations.md");

/// The Secrets that an operator creates for an object, as suffixes of its name, and their keys.
const CREATED: [(&str, &str, &[&str]); 3] = [
    ("RabbitmqCluster", "-default-user", &["connection_string"]),
    ("Cluster", "-app", &["username", "password"]),
    ("Cluster", "-ca", &["ca.crt"]),
];

/// The rows of the table below a heading of the guide, without markup.
fn table(document: &str, heading: &str) -> Vec<Vec<String>> {
    let (_, section) = document.split_once(&format!("\n{heading}\n")).unwrap();
    let lines = section.lines().skip_while(|line| !line.starts_with("| ---")).skip(1);
    let rows = lines.take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

/// The quoted names in a cell.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// The Secrets that an operator has to create before applying a build, and their keys.
fn documented_secrets(build: &Build) -> BTreeMap<String, Vec<String>> {
    let rows = table(GUIDE, "### Secrets").into_iter();
    let rows =
        rows.filter(|row| quoted(&row[0]).any(|part| build.servers == part || build.has(part)));
    let secrets = rows.flat_map(|row| {
        let names: Vec<String> = quoted(&row[1])
            .scan(String::new(), |first, name| {
                // Names after the first may omit its beginning: `lastseen-database-a`, `-b`.
                if name.starts_with('-') {
                    return Some(format!("{}{name}", first.rsplit_once('-').unwrap().0));
                }
                name.clone_into(first);
                Some(name.to_owned())
            })
            .collect();
        let keys: Vec<String> = quoted(&row[2]).map(str::to_owned).collect();
        names.into_iter().map(move |name| (name, keys.clone()))
    });
    secrets.collect()
}

/// All Secrets that exist in the namespace of a build, and their keys.
fn secrets(build: &Build) -> BTreeMap<String, Vec<String>> {
    let mut secrets = documented_secrets(build);
    for (kind, suffix, keys) in CREATED {
        for item in of_kind(&build.items, kind) {
            let name = format!("{}{suffix}", text(&item["metadata"]["name"]));
            secrets.insert(name, keys.iter().map(|&key| key.to_owned()).collect());
        }
    }
    secrets
}

/// The files in a volume by the object that contains them: its kind, its name and the list of
/// keys, which may be missing.
fn sources(volume: &'static Value) -> Vec<(&'static str, &'static str, &'static Value)> {
    let source = |kind: &'static str, source: &'static Value| {
        let name = source.get("secretName").or(source.get("name"))?;
        Some((kind, text(name), &source["items"]))
    };
    let projected = list(&volume["projected"]["sources"]).iter();
    let all = [volume].into_iter().chain(projected).flat_map(|volume| {
        [source("Secret", &volume["secret"]), source("ConfigMap", &volume["configMap"])]
    });
    all.flatten().collect()
}

#[test]
fn every_mounted_and_referenced_object_exists() {
    for build in builds() {
        let secrets = secrets(build);
        let is_map = |name: &str| {
            of_kind(&build.items, "ConfigMap").any(|map| map["metadata"]["name"] == name)
        };
        let mut used = BTreeSet::new();
        for workload in build.workloads() {
            let place = workload.place();
            let mounts = list(&workload.container()["volumeMounts"]).iter();
            let mounts: BTreeSet<&str> = mounts.map(|mount| text(&mount["name"])).collect();
            for volume in list(&workload.pod()["volumes"]) {
                assert!(mounts.contains(text(&volume["name"])), "{place}: unused {volume}");
                // Besides its name. The API server rejects a volume with two sources.
                assert_eq!(volume.as_object().unwrap().len(), 2, "{place}: {volume}");
                for (kind, name, items) in sources(volume) {
                    if kind == "ConfigMap" {
                        assert!(is_map(name), "{place}: no ConfigMap {name}");
                        continue;
                    }
                    let keys =
                        secrets.get(name).unwrap_or_else(|| panic!("{place}: no Secret {name}"));
                    for item in list(items) {
                        assert!(
                            keys.iter().any(|key| item["key"] == *key.as_str()),
                            "{place}: {item}"
                        );
                    }
                    used.insert(name.to_owned());
                }
            }
            // Panics if a ConfigMap is missing.
            workload.shared_variables();
            let env = list(&workload.container()["env"]).iter();
            assert!(env.clone().all(|variable| variable["value"].is_string()), "{place}");
        }
        let documented: BTreeSet<String> = documented_secrets(build).into_keys().collect();
        assert!(documented.is_subset(&used), "{}: of {documented:?} only {used:?}", build.name);
    }
}

/// The files that a pod reads from Secrets, by variable.
fn secret_files(workload: &Workload) -> BTreeMap<&'static str, &'static str> {
    let variables = workload.own_variables().into_iter();
    variables
        .filter(|(name, value)| name.ends_with("_FILE") || value.starts_with("/run/"))
        .collect()
}

#[test]
fn every_secret_is_read_from_a_file_of_a_mounted_secret() {
    for workload in workloads() {
        let secrets = secrets(workload.build);
        for (name, path) in secret_files(&workload) {
            let place = format!("{}: {name}", workload.place());
            let (volume, file) = workload.volume_at(path);
            let mut sources = sources(volume).into_iter().filter(|(kind, ..)| *kind == "Secret");
            let is_there = sources.any(|(_, secret, items)| match list(items) {
                // Without a list, every key becomes a file.
                [] => secrets.get(secret).is_some_and(|keys| keys.iter().any(|key| key == file)),
                items => items.iter().any(|item| item["path"] == file),
            });
            assert!(is_there, "{place}: no Secret in {volume} has {file}");
        }
        assert!(!secret_files(&workload).is_empty(), "{}", workload.place());
    }
}

#[test]
fn every_object_has_the_label_of_lastseen() {
    let label = "app.kubernetes.io/part-of";
    for build in builds() {
        for item in &build.items {
            let kind = text(&item["kind"]);
            // Their operators may copy labels to the pods, which the policies of the services
            // would then isolate.
            let is_server = kind == "Cluster" || kind == "RabbitmqCluster";
            let expected = if is_server { Value::Null } else { "lastseen".into() };
            let (name, labels) = (&item["metadata"]["name"], &item["metadata"]["labels"]);
            assert_eq!(labels[label], expected, "{}: {kind} {name}", build.name);
        }
        for workload in build.workloads() {
            assert_eq!(workload.labels()[label], "lastseen", "{}", workload.place());
        }
    }
}

/// The roles that export each metric, from `docs/operations.md`.
fn exporters() -> BTreeMap<String, String> {
    let rows = table(OPERATIONS, "## Metrics").into_iter();
    let rows = rows.map(|row| {
        let name = quoted(&row[0]).next().unwrap().split('{').next().unwrap().to_owned();
        (name, row[2].clone())
    });
    rows.collect()
}

/// The metrics in a query.
fn metrics(query: &str) -> impl Iterator<Item = &str> {
    query.match_indices("lastseen_").map(|(at, _)| {
        let is_part = |letter: char| letter.is_ascii_lowercase() || letter == '_';
        let end = query[at..].find(|letter| !is_part(letter));
        &query[at..end.map_or(query.len(), |end| at + end)]
    })
}

/// Whether a pod that Prometheus can scrape exports one of the metrics of a query.
fn is_exported(query: &str, scraped: &[&str], exporters: &BTreeMap<String, String>) -> bool {
    metrics(query).any(|metric| {
        let roles = exporters.get(metric).unwrap_or_else(|| panic!("{metric} is not documented"));
        roles.starts_with("all") || scraped.iter().any(|role| roles.contains(role))
    })
}

#[test]
fn every_alert_and_scaling_query_has_a_metric_that_is_scraped() {
    let exporters = exporters();
    for build in builds() {
        let monitor = of_kind(&build.items, "ServiceMonitor").next();
        let is_scraped = |service: &&Value| {
            let labels = &service["metadata"]["labels"];
            service["spec"]["ports"][0]["name"] == "admin"
                && monitor.is_none_or(|monitor| selects(&monitor["spec"]["selector"], labels))
        };
        let services = of_kind(&build.items, "Service").filter(is_scraped);
        let pods = build.workloads();
        let scraped = services.flat_map(|service| {
            let pods = pods.iter();
            pods.filter(|pod| selects(&service["spec"]["selector"], pod.labels()))
        });
        let scraped: Vec<&str> = scraped.map(Workload::name).collect();
        let rules = of_kind(&build.items, "PrometheusRule")
            .flat_map(|rule| list(&rule["spec"]["groups"][0]["rules"]))
            .map(|rule| text(&rule["expr"]));
        let triggers = of_kind(&build.items, "ScaledObject")
            .flat_map(|scaled| list(&scaled["spec"]["triggers"]))
            .map(|trigger| text(&trigger["metadata"]["query"]));
        for query in rules.chain(triggers) {
            assert!(is_exported(query, &scraped, &exporters), "{}: {query}", build.name);
        }
    }
}

/// The objects of a build in no particular order.
fn sorted(build: &Build) -> BTreeSet<String> {
    build.items.iter().map(Value::to_string).collect()
}

#[test]
fn order_of_components_never_matters_or_is_refused() {
    let servers = &builds()[0].servers;
    let components = folders("components");
    for pair in pairs(&components) {
        let [first, second] = [&pair[0], &pair[1]];
        if is_refused([first, second]) {
            let folder = write_overlay(&[servers], &pair);
            let error = run_script(&[&folder]).map(drop).expect_err("kubectl accepts the order");
            assert!(error.contains("no matches for Id"), "{first}, {second}: {error}");
            continue;
        }
        if is_refused([second, first]) {
            continue;
        }
        let [build, reversed] = [[first, second], [second, first]].map(|list| {
            let mut mine = builds().iter().filter(|build| build.servers == *servers);
            mine.find(|build| build.components.iter().eq(list)).unwrap()
        });
        assert_eq!(sorted(build), sorted(reversed), "{first}, {second}");
    }
}

#[test]
fn exactly_one_folder_of_servers_is_needed() {
    let all = folders("servers");
    let none = write_overlay(&[], &[]);
    let error = run_script(&[&none]).map(drop).expect_err("kubectl builds no servers");
    assert!(error.contains("cannot merge or replace"), "{error}");
    for [first, second] in pairs(&all) {
        let both = write_overlay(&[&first, &second], &[]);
        let error =
            run_script(&[&both]).map(drop).expect_err("kubectl builds two folders of servers");
        assert!(error.contains("already registered id"), "{first}, {second}: {error}");
    }
}

#[test]
fn guide_lists_all_servers_and_components() {
    let rows = table(GUIDE, "### Combinations");
    let documented: BTreeSet<&str> = rows.iter().flat_map(|row| quoted(&row[0])).collect();
    let (servers, components) = (folders("servers"), folders("components"));
    let prefixed = |parent: &str, names: Vec<String>| {
        names.into_iter().map(move |name| format!("{parent}/{name}")).collect::<Vec<_>>()
    };
    let expected = [prefixed("servers", servers), prefixed("components", components)].concat();
    assert_eq!(documented, expected.iter().map(String::as_str).collect());
}
