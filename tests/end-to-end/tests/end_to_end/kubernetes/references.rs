//! Objects that name other objects: selectors, ports, files and addresses.

use serde_json::Value;

use super::manifests::{Build, Workload, builds, find, list, of_kind, selects, text, workloads};

/// The workloads of a build whose pods a selector selects.
fn selected(build: &'static Build, selector: &Value) -> Vec<Workload> {
    let mine = build.workloads().into_iter();
    mine.filter(|workload| selects(selector, workload.labels())).collect()
}

#[test]
fn every_selector_selects_the_pods_of_one_service() {
    for build in builds() {
        let (overlay, items) = (&build.name, &build.items);
        let of_workloads = items.iter().filter(|item| item["kind"] != "NetworkPolicy");
        for item in of_workloads.filter(|item| item["spec"]["selector"].is_object()) {
            if item["kind"] == "ServiceMonitor" {
                continue;
            }
            let name = text(&item["metadata"]["name"]);
            let service = name.trim_end_matches("-admin");
            let pods = selected(build, &item["spec"]["selector"]);
            let pods: Vec<&str> = pods.iter().map(Workload::name).collect();
            assert_eq!(pods, [service], "{overlay}: {} {name}", item["kind"]);
        }
        for workload in build.workloads() {
            for spread in list(&workload.pod()["topologySpreadConstraints"]) {
                assert!(selects(&spread["labelSelector"], workload.labels()), "{spread}");
            }
        }
    }
}

#[test]
fn every_service_leads_to_a_port_of_its_pods() {
    for build in builds() {
        let (overlay, items) = (&build.name, &build.items);
        for service in of_kind(items, "Service") {
            for port in list(&service["spec"]["ports"]) {
                for workload in selected(build, &service["spec"]["selector"]) {
                    let target = workload.ports().get(text(&port["targetPort"])).copied();
                    assert_eq!(target, port["port"].as_u64(), "{overlay}: {service}");
                }
            }
        }
        let producer = &find(items, "StatefulSet", "producer")["spec"]["serviceName"];
        let governing = find(items, "Service", text(producer));
        assert_eq!(governing["spec"]["clusterIP"], "None");
    }
}

#[test]
fn every_replicated_service_has_a_disruption_budget_and_is_spread() {
    for workload in workloads() {
        if workload.item["spec"]["replicas"] == 1 || workload.item["kind"] == "CronJob" {
            continue;
        }
        let budget = find(&workload.build.items, "PodDisruptionBudget", workload.name());
        assert_eq!(budget["spec"]["maxUnavailable"], 1);
        assert_eq!(list(&workload.pod()["topologySpreadConstraints"]).len(), 2);
    }
}

#[test]
fn viewer_scrapes_every_other_service_at_its_address() {
    for viewer in workloads().filter(|workload| workload.name() == "viewer") {
        let urls = viewer.own_variables()["VIEWER_METRICS"];
        let of_others = of_kind(&viewer.build.items, "Service")
            .filter(|service| service["spec"]["clusterIP"] == "None")
            .filter(|service| service["metadata"]["name"] != "viewer-admin")
            .map(|service| {
                let (name, ports) = (&service["metadata"]["name"], &service["spec"]["ports"]);
                format!("http://{}:{}/metrics", text(name), ports[0]["port"])
            });
        let (mut urls, mut expected): (Vec<_>, Vec<_>) =
            (urls.split(',').map(str::to_owned).collect(), of_others.collect());
        urls.sort();
        expected.sort();
        assert_eq!(urls, expected, "{}", viewer.place());
    }
}

/// Kubernetes never updates a file that is mounted by itself, and the hash in the name of a
/// generated `ConfigMap` would restart the pods.
#[test]
fn settings_file_is_in_a_config_map_that_the_services_follow() {
    for workload in workloads().filter(|workload| workload.name() != "migration") {
        let (volume, file) = workload.volume_at(workload.own_variables()["LASTSEEN_CONFIG"]);
        assert_eq!(
            (text(&volume["configMap"]["name"]), file),
            ("lastseen-settings", "lastseen.env")
        );
        let mut mounts = list(&workload.container()["volumeMounts"]).iter();
        assert!(mounts.all(|mount| mount.get("subPath").is_none()), "{}", workload.place());
    }
}

#[test]
fn no_secret_is_in_a_variable() {
    for workload in workloads() {
        let (own, shared) = (workload.own_variables(), workload.shared_variables());
        for name in ["AMQP_URI", "DATABASE_URL", "POSTGRES_PASSWORD", "CALLBACK_SECRET"] {
            let is_set = own.contains_key(name) || shared.contains_key(name);
            assert!(!is_set, "{}: {name}", workload.place());
        }
    }
}
