//! The metrics of each service under load.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use testkit::{
    Answer, Database, PATIENCE, Partner, Process, Queue, Scratch, StatusApi, System, all_ready,
    callback_endpoint, wait_for, wait_until,
};

use crate::promtool::promtool;
use crate::rules::queried_metrics;

/// A status API with online and offline ids, and one id whose lookups always fail.
fn status_api() -> StatusApi {
    StatusApi::start(|id, _| match id {
        13 => Answer::Status(500),
        id if id % 2 == 0 => Answer::Online,
        _ => Answer::Offline,
    })
}

/// The text of `/metrics` of a service.
async fn scrape(service: &Process) -> String {
    let (status, text) = service.get("/metrics").await;
    assert_eq!(status, 200, "{text}");
    text
}

/// The names of all metrics in a text of Prometheus's format.
fn names(text: &str) -> BTreeSet<String> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types.filter_map(|rest| rest.split(' ').next()).map(str::to_owned).collect()
}

/// Waits until a metric of the service has an expected value, and returns it.
async fn metric(service: &Process, name: &str, is_expected: impl Fn(f64) -> bool) -> f64 {
    wait_for(name, async || {
        Some(service.metric(&format!("{name} ")).await).filter(|value| is_expected(*value))
    })
    .await
}

/// Whether a value equals `count`.
fn is(count: u32) -> impl Fn(f64) -> bool {
    move |value| (value - f64::from(count)).abs() < 0.5
}

/// Posts callbacks until one message has become a dead letter and the others are settled.
async fn work(endpoint: &str, consumer: &Process) {
    let partner = Partner::with_timeout(PATIENCE);
    // A failure counts only if the API has answered other lookups before and after it.
    wait_until("a message becomes a dead letter", async || {
        assert!(partner.post(endpoint, &[2, 4, 7]).await);
        assert!(partner.post(endpoint, &[13]).await);
        consumer.metric("lastseen_settled_total{disposition=\"dead_letter\"}").await >= 1.0
    })
    .await;
    metric(consumer, "lastseen_dead_letters", |count| count >= 1.0).await;
}

/// Waits until the program's `healthcheck`, which docker-compose.yml uses, reports only `ready`. At
/// first it may also report an optional connection that is not there yet.
async fn is_healthy(name: &str, service: &Process) {
    let address = [("ADMIN_ADDR", service.admin().await.to_string())];
    wait_until(&format!("{name} is healthy"), async || {
        let check = Process::spawn(name, &address, &["healthcheck"]);
        assert_eq!(check.wait().await.code(), Some(0), "{name}: {:?}", check.log());
        check.log() == ["ready"]
    })
    .await;
}

/// Checks the values of a consumer's metrics, on a queue of either backend.
async fn check_values(consumer: &Process) {
    let online = consumer.metric("lastseen_lookups_total{outcome=\"online\"}").await;
    assert!(online >= 2.0, "{online}");
    let commits = "lastseen_callback_to_commit_seconds_count";
    let commits = metric(consumer, commits, |commits| commits >= online).await;
    let seconds = consumer.metric("lastseen_callback_to_commit_seconds_sum").await / commits;
    assert!(0.0 < seconds && seconds < 10.0, "{seconds} s from a callback to the commit");
    metric(consumer, "lastseen_queue_messages", is(0)).await;
    metric(consumer, "lastseen_process_resident_memory_bytes", |bytes| bytes > 1e6).await;
    metric(consumer, "lastseen_process_cpu_seconds_total", |seconds| seconds > 0.0).await;
}

#[tokio::test]
async fn metrics_are_well_formed_correct_and_documented() {
    let (queue, database, status_api) = (Queue::new(), Database::new().await, status_api());
    let system = System::new(&queue, &database, &status_api.endpoint());
    let producer = system.spawn("producer", &[]);
    let settings = [("MAX_ATTEMPTS", "1"), ("WRITE_BATCH_LINGER", "1ms")];
    let consumer = system.spawn("consumer", &settings);
    let routine = system.spawn("routine", &[("ROUTINE_INTERVAL", "100ms")]);
    let scratch = Scratch::new("groups");
    let groups = scratch.path().join("groups.json");
    std::fs::write(&groups, r#"{"name": "shop", "objects": [2, 13], "up": "any"}"#).unwrap();
    let viewer = system.spawn("viewer", &[("GROUPS_FILE", groups.to_str().unwrap())]);
    let endpoint = callback_endpoint(&producer).await;
    producer.ready().await;
    let address = ("TESTER_ADDR", "127.0.0.1:0");
    let callbacks = [("CALLBACK_ENDPOINT", endpoint.as_str()), ("CALLBACK_INTERVAL", "100ms")];
    let tester = system.spawn("tester", &[address, callbacks[0], callbacks[1]]);
    let services = [producer, consumer, routine, viewer, tester];
    all_ready(&services).await;
    let [producer, consumer, routine, viewer, tester] = &services;
    for (name, service) in
        ["producer", "consumer", "routine", "viewer", "tester"].into_iter().zip(&services)
    {
        is_healthy(name, service).await;
        metric(service, &format!("lastseen_ready{{role=\"{name}\"}}"), is(1)).await;
    }
    work(&endpoint, consumer).await;
    metric(viewer, "lastseen_groups{status=\"up\"}", is(1)).await;
    metric(consumer, "lastseen_breaker_state", is(0)).await;
    metric(producer, "lastseen_callback_ids_total", |ids| ids >= 4.0).await;
    let cleaned_at = "lastseen_cleanup_last_success_timestamp_seconds";
    let cleaned_at = metric(routine, cleaned_at, |at| at > 0.0).await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    assert!((now - 30.0..=now).contains(&cleaned_at), "cleaned up at {cleaned_at}, now {now}");
    tester.stop().await;
    check_values(consumer).await;
    // The thread of the spool exports its first values after a second.
    let exports_last = async || scrape(producer).await.contains("lastseen_damaged_files{");
    wait_until("the producer exports the metrics of its spool", exports_last).await;

    let (_, documented) =
        include_str!("../../../../docs/operations.md").split_once("\n## Metrics\n").unwrap();
    let (documented, _) = documented.split_once("\n## ").unwrap();
    let documented: BTreeSet<String> = documented
        .lines()
        .filter_map(|line| line.strip_prefix("| `lastseen_")?.split(['`', '{']).next())
        .map(|rest| format!("lastseen_{rest}"))
        .collect();
    let mut exported = BTreeSet::from(["lastseen_commit_seconds".to_owned()]);
    let mut missing = queried_metrics();
    for service in [producer, consumer, routine, viewer] {
        let text = scrape(service).await;
        promtool(&["check", "metrics"], &text);
        exported.extend(names(&text));
        let samples = text.lines().filter_map(|line| line.split(['{', ' ']).next());
        samples.for_each(|name| _ = missing.remove(name));
    }
    assert!(
        missing.is_empty(),
        "the alerts or the dashboard query metrics that no service exports: {missing:?}"
    );
    let testers = documented.iter().filter(|name| name.starts_with("lastseen_tester_"));
    exported.extend(testers.cloned());
    assert_eq!(exported, documented, "exported metrics, and those in docs/operations.md");
}

/// Starts `lastseen` on files in `home`, without its simulated partner and status API.
fn spawn_lastseen(
    home: &Scratch,
    status_api: &StatusApi,
    settings: &[(&'static str, &str)],
) -> Process {
    let mut environment = vec![
        ("PRODUCER_ADDR", "127.0.0.1:0".to_owned()),
        ("VIEWER_ADDR", "127.0.0.1:0".to_owned()),
        ("LASTSEEN_DIR", home.path().join("data").display().to_string()),
        ("TESTER_ENDPOINT", status_api.endpoint()),
    ];
    environment.extend(settings.iter().map(|(name, value)| (*name, (*value).to_owned())));
    Process::spawn("lastseen", &environment, &["--no-tester"])
}

#[tokio::test]
async fn lastseen_on_files_exports_correct_queue_metrics() {
    let (home, status_api) = (Scratch::new("home"), status_api());
    let lastseen = spawn_lastseen(&home, &status_api, &[("MAX_ATTEMPTS", "1")]);
    lastseen.ready().await;
    let address = [("ADMIN_ADDR", lastseen.admin().await.to_string())];
    let check = Process::spawn("lastseen", &address, &["healthcheck"]);
    assert_eq!(check.wait().await.code(), Some(0), "{:?}", check.log());
    for role in ["producer", "consumer", "routine", "viewer"] {
        metric(&lastseen, &format!("lastseen_ready{{role=\"{role}\"}}"), is(1)).await;
    }
    work(&callback_endpoint(&lastseen).await, &lastseen).await;
    check_values(&lastseen).await;
    let text = scrape(&lastseen).await;
    promtool(&["check", "metrics"], &text);
    assert!(names(&text).contains("lastseen_commit_seconds"), "{text}");
}

#[tokio::test]
async fn waiting_messages_are_exported_with_their_age() {
    let status_api = StatusApi::start(|_, _| Answer::Hang);
    let (queue, database) = (Queue::new(), Database::new().await);
    let system = System::new(&queue, &database, &status_api.endpoint());
    let producer = system.spawn("producer", &[]);
    // With these settings it has at most two unsettled messages.
    let settings = [("MAX_CONSUMERS", "1"), ("COALESCE", "off"), ("STATUS_TIMEOUT", "60s")];
    let consumer = system.spawn("consumer", &settings);
    let home = Scratch::new("home");
    let lastseen = spawn_lastseen(&home, &status_api, &settings);
    all_ready([&producer, &consumer, &lastseen]).await;
    let partner = Partner::with_timeout(PATIENCE);
    for (producer, consumer) in [(&producer, &consumer), (&lastseen, &lastseen)] {
        assert!(partner.post(&callback_endpoint(producer).await, &[1, 2, 3, 4, 5]).await);
        metric(consumer, "lastseen_unsettled_messages", is(2)).await;
        metric(consumer, "lastseen_queue_messages", is(3)).await;
        let age = "lastseen_oldest_message_age_seconds";
        let before = metric(consumer, age, |seconds| seconds > 0.0).await;
        let later = metric(consumer, age, |seconds| seconds > before).await;
        assert!(later < PATIENCE.as_secs_f64(), "{later}");
        metric(consumer, "lastseen_lookups_in_flight", is(1)).await;
    }
    // A graceful stop would wait for the lookups.
    for service in [producer, consumer, lastseen] {
        service.kill();
    }
}
