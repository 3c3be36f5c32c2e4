//! What runs in each pod: commands, settings, ports, probes, rights and times.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use testkit::{Authority, Process, Scratch, WITH_READ_ONLY_ROOT, free_port, http_get};

use super::manifests::{
    Build, Workload, builds, distinct_workloads, list, overlays, settings_file, text, workloads,
};
use crate::settings::{Names, default_in, help_of, listed};

const DOCKERFILE: &str = include_str!("../../../../../Dockerfile");

/// The variables of the addresses that a service listens on, by the names of the ports.
const ADDRESSES: [(&str, &str); 3] =
    [("callbacks", "PRODUCER_ADDR"), ("page", "VIEWER_ADDR"), ("admin", "ADMIN_ADDR")];

#[test]
fn every_pod_runs_a_program_of_the_image_as_its_user() {
    let (_, links) = DOCKERFILE.split_once("for role in ").unwrap();
    let mut programs: Vec<&str> = links.split(';').next().unwrap().split(' ').collect();
    programs.push("lastseen");
    let (_, user) = DOCKERFILE.split_once("USER ").unwrap();
    let user: u64 = user.split(':').next().unwrap().parse().unwrap();
    for workload in workloads() {
        let (place, container) = (workload.place(), workload.container());
        assert!(programs.contains(&workload.command()[0]), "{place}: {:?}", workload.command());
        let image = text(&container["image"]);
        assert!(image.ends_with(&format!("/lastseen:{}", env!("CARGO_PKG_VERSION"))), "{image}");
        let expected = json!({
            "runAsNonRoot": true, "runAsUser": user, "runAsGroup": user, "fsGroup": user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        });
        let pod = workload.pod();
        assert_eq!(pod["securityContext"], expected, "{place}");
        let expected = json!({
            "allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"]},
        });
        assert_eq!(container["securityContext"], expected, "{place}");
        assert_eq!(pod["automountServiceAccountToken"], false, "{place}");
        assert_eq!(pod["enableServiceLinks"], false, "{place}");
        assert!(container["resources"]["limits"]["memory"].is_string(), "{place}");
        assert!(container["resources"]["requests"]["cpu"].is_string(), "{place}");
        let writable = list(&container["volumeMounts"]).iter();
        let writable = writable.filter(|mount| mount["readOnly"] != true);
        let writable: Vec<&str> = writable.map(|mount| text(&mount["name"])).collect();
        let expected: &[&str] = if workload.name() == "producer" { &["spool"] } else { &[] };
        assert_eq!(writable, expected, "{place}");
    }
}

#[tokio::test]
async fn every_setting_in_the_manifests_exists() {
    let mut of_program = BTreeMap::new();
    for program in ["producer", "consumer", "routine", "viewer", "lastseen"] {
        of_program.insert(program, listed(program).await);
    }
    let base = |name: &str| name.trim_end_matches("_FILE").to_owned();
    for workload in workloads() {
        let Names { all, .. } = &of_program[workload.command()[0]];
        for name in workload.own_variables().keys() {
            assert!(all.contains(&base(name)), "{}: {name} is no setting", workload.place());
        }
        for name in workload.shared_variables().keys() {
            let is_known = of_program.values().any(|names| names.all.contains(&base(name)));
            // Services without a database read TZ without listing it.
            assert!(is_known || *name == "TZ", "{}: {name} is no setting", workload.place());
        }
    }
    let reloadable: BTreeSet<&String> =
        of_program.values().flat_map(|names| &names.reloadable).collect();
    for build in builds() {
        let (overlay, settings) = (&build.name, settings_file(&build.items));
        let names = settings.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        for name in names.map(|line| line.split('=').next().unwrap()) {
            let is_reloadable = reloadable.contains(&name.to_owned());
            assert!(is_reloadable, "{overlay}: {name} takes effect only at the next start");
        }
    }
}

/// Starts each pod's command with the pod's settings, on a read-only file system and with servers
/// that are away.
#[tokio::test]
async fn every_pod_starts_with_its_settings_and_answers_its_probes() {
    for workload in distinct_workloads() {
        let place = workload.place();
        let (scratch, authority) = (Scratch::new("pod"), Authority::new());
        let mut environment = environment_here(&workload, &scratch, &authority);
        // The process may log its address as JSON.
        let admin = SocketAddr::from(([127, 0, 0, 1], free_port()));
        environment.push(("ADMIN_ADDR", admin.to_string()));
        let command = workload.command();
        let process =
            Process::spawn_wrapped(&WITH_READ_ONLY_ROOT, command[0], &environment, &command[1..]);
        if workload.name() == "migration" {
            process.wait_for_log("no database").await;
            continue;
        }
        process.wait_for_log("starting").await;
        if workload.item["kind"] == "CronJob" {
            continue;
        }
        let container = workload.container();
        for (probe, statuses) in
            [("livenessProbe", [200].as_slice()), ("readinessProbe", &[200, 503])]
        {
            let request = &container[probe]["httpGet"];
            assert_eq!(request["port"], "admin", "{place}");
            let path = text(&request["path"]);
            let reply = http_get(admin, path).await.unwrap();
            assert!(statuses.contains(&reply.status), "{place}: {path} is answered {reply:?}");
        }
        assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/readyz", "{place}");
        let unknown = process.log().into_iter().find(|line| line.contains("is not a setting"));
        assert_eq!(unknown, None, "{place}");
    }
}

/// The variables of a pod, with its mounted files in `scratch`, and free ports of this machine.
fn environment_here(
    workload: &Workload,
    scratch: &Scratch,
    authority: &Authority,
) -> Vec<(&'static str, String)> {
    let port = free_port();
    let mut environment: Vec<_> = ADDRESSES.map(|(_, name)| (name, "127.0.0.1:0".into())).into();
    environment
        .extend(workload.shared_variables().into_iter().map(|(name, value)| (name, value.into())));
    for (name, value) in workload.own_variables() {
        if !value.starts_with('/') {
            environment.push((name, value.to_owned()));
            continue;
        }
        let (volume, file) = workload.volume_at(value);
        let folder = text(volume.get("name").unwrap_or(&volume["metadata"]["name"]));
        let path = scratch.path().join(folder).join(file);
        let content = match name.trim_end_matches("_FILE") {
            "SPOOL_DIR" => {
                fs::create_dir_all(&path).unwrap();
                environment.push((name, path.display().to_string()));
                continue;
            }
            "LASTSEEN_CONFIG" => settings_file(&workload.build.items).to_owned(),
            "AMQP_URI" => format!("amqp://user:secret@127.0.0.1:{port}/"),
            "DATABASE_URL" => format!("postgres://user:secret@127.0.0.1:{port}/lastseen"),
            "POSTGRES_SSLROOTCERT" => authority.pem().to_owned(),
            "CALLBACK_SECRET" => "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".to_owned(),
            _ => "lastseen".to_owned(),
        };
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        environment.push((name, path.display().to_string()));
    }
    environment
}

#[tokio::test]
async fn every_container_port_is_the_port_of_its_service() {
    for workload in distinct_workloads() {
        let help = help_of(workload.command()[0]).await;
        for (name, port) in workload.ports() {
            let (_, variable) = ADDRESSES.iter().find(|(named, _)| *named == name).unwrap();
            let address = setting(&workload, &help, variable);
            assert_eq!(address, format!(":{port}"), "{}: {name}", workload.place());
        }
    }
}

/// The value of a setting in a pod, or its default.
fn setting(workload: &Workload, help: &[String], name: &str) -> String {
    let (shared, own) = (workload.shared_variables(), workload.own_variables());
    let set = own.get(name).or(shared.get(name)).map(|&value| value.to_owned());
    set.unwrap_or_else(|| default_in(help, name))
}

fn duration(text: &str) -> Duration {
    humantime::parse_duration(text).unwrap()
}

#[tokio::test]
async fn grace_period_of_every_pod_outlasts_its_drain() {
    for workload in distinct_workloads() {
        let help = help_of(workload.command()[0]).await;
        // A command has no delay.
        let is_service = workload.container()["readinessProbe"].is_object();
        let delay = if is_service { "DRAIN_DELAY" } else { "DRAIN_TIMEOUT" };
        let delay = duration(&setting(&workload, &help, delay));
        let delay = if is_service { delay } else { Duration::ZERO };
        let drain = delay + duration(&setting(&workload, &help, "DRAIN_TIMEOUT"));
        let grace = workload.pod()["terminationGracePeriodSeconds"].as_u64().unwrap();
        // At its end, a process may wait for the collector of traces for two seconds.
        let longest = drain + Duration::from_secs(5);
        assert!(Duration::from_secs(grace) >= longest, "{}: {grace} s", workload.place());
    }
}

#[tokio::test]
async fn producer_relays_its_spool_before_its_pod_is_removed() {
    let producers: Vec<_> = workloads().filter(|it| it.name() == "producer").collect();
    assert_eq!(producers.len(), builds().len());
    let help = help_of("producer").await;
    for producer in producers {
        assert_eq!(producer.item["kind"], "StatefulSet");
        assert_eq!(setting(&producer, &help, "DRAIN_SPOOL"), "on");
        let spec = &producer.item["spec"];
        let retain = json!({"whenDeleted": "Retain", "whenScaled": "Retain"});
        assert_eq!(spec["persistentVolumeClaimRetentionPolicy"], retain);
        let (claim, rest) = producer.volume_at(producer.own_variables()["SPOOL_DIR"]);
        assert_eq!(rest, "");
        let storage = text(&claim["spec"]["resources"]["requests"]["storage"]);
        let storage: u64 = storage.strip_suffix("Gi").unwrap().parse().unwrap();
        let spool: u64 = setting(&producer, &help, "SPOOL_MAX_BYTES").parse().unwrap();
        // The ballast and the write-ahead log come on top.
        assert!(storage << 30 >= spool + (256 << 20), "{storage} GiB for {spool} bytes");
    }
}

#[tokio::test]
async fn cron_job_may_run_for_longer_than_the_ttl() {
    let mut cron_jobs = 0;
    let jobs = overlays().flat_map(Build::workloads);
    for job in jobs.filter(|workload| workload.item["kind"] == "CronJob") {
        cron_jobs += 1;
        assert_eq!(job.command(), ["routine", "--once"]);
        let mut settings = settings_file(&job.build.items).lines();
        let ttl = settings.find_map(|line| line.strip_prefix("OBJECT_TTL=")).unwrap();
        let spec = &job.item["spec"];
        assert_eq!(spec["concurrencyPolicy"], "Forbid");
        let limit = spec["jobTemplate"]["spec"]["activeDeadlineSeconds"].as_u64().unwrap();
        // It also waits up to 30 s for the database.
        assert!(Duration::from_secs(limit) > duration(ttl) + Duration::from_mins(1), "{limit} s");
    }
    assert_eq!(cron_jobs, 1);
}
