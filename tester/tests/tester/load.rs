//! Tests of the load generator.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use runtime::CancellationToken;
use tester::Report;
use tester::config::Command;
use tester::ledger::{Answer, Entry};

use testkit::install_tls;

use crate::support::{Endpoint, settings, soon};

async fn run(target: &str, flags: &[&str], shutdown: CancellationToken) -> Report {
    try_run(target, flags, shutdown).await.unwrap()
}

async fn try_run(
    target: &str,
    flags: &[&str],
    shutdown: CancellationToken,
) -> anyhow::Result<Report> {
    install_tls();
    let url = format!("--callback-endpoint=http://{target}");
    let mut all = vec!["load", url.as_str()];
    all.extend(flags);
    let config = settings(&all);
    let Some(Command::Load(load)) = config.command else { panic!("no load") };
    soon(tester::load::run(&load, &config.callbacks, &config.authenticity, shutdown)).await
}

async fn load(endpoint: &Endpoint, flags: &[&str]) -> Report {
    run(&endpoint.address.to_string(), flags, CancellationToken::new()).await
}

#[tokio::test]
async fn at_a_rate_all_due_callbacks_are_sent_and_reported() {
    let mut endpoint = Endpoint::answering(200).await;
    let flags = ["--rate=100", "--duration=500ms", "--ids=3", "--connections=4"];
    let report = load(&endpoint, &flags).await;
    assert_eq!((report.sent, report.accepted, report.unsent), (50, 50, 0), "{report:?}");
    assert_eq!((report.other, report.unanswered, report.failed), (0, 0, 0), "{report:?}");
    assert_eq!(report.statuses.into_iter().collect::<Vec<_>>(), [(200, 50)]);
    // The last callback is due after 490 ms.
    assert!(report.seconds >= 0.49, "{}", report.seconds);
    let per_second = 50.0 / report.seconds;
    assert!((report.callbacks_per_second - per_second).abs() < 0.001);
    assert!((report.ids_per_second - 3.0 * per_second).abs() < 0.001);
    let latency = report.latency_ms;
    let ascending = [0.0, latency.p50, latency.p90, latency.p99, latency.p999, latency.max];
    assert!(ascending.is_sorted() && latency.p50 > 0.0, "{latency:?}");

    let callbacks = endpoint.all_ids();
    assert_eq!(callbacks.len(), 50);
    assert!(callbacks.iter().all(|ids| ids.len() == 3));
    assert!(callbacks.iter().flatten().all(|id| (0..=99).contains(id)));
}

#[tokio::test]
async fn without_a_rate_the_total_is_sent() {
    let mut endpoint = Endpoint::answering(202).await;
    let report = load(&endpoint, &["--total=500", "--connections=8"]).await;
    assert_eq!((report.sent, report.accepted, report.unsent), (500, 500, 0), "{report:?}");
    assert_eq!(endpoint.all_ids().len(), 500);
}

#[tokio::test]
async fn unique_ids_count_up_without_repeats() {
    let mut endpoint = Endpoint::answering(200).await;
    let flags =
        ["--total=40", "--ids=5", "--unique", "--object-id-min=1000", "--object-id-max=1000"];
    load(&endpoint, &flags).await;
    let mut ids: Vec<i64> = endpoint.all_ids().concat();
    ids.sort_unstable();
    assert_eq!(ids, (1_000..1_200).collect::<Vec<i64>>());
}

#[tokio::test]
async fn response_after_more_than_a_second_counts_as_unanswered() {
    let endpoint = Endpoint::slow(Duration::from_millis(1_500), u64::MAX).await;
    let report = load(&endpoint, &["--total=3", "--connections=3"]).await;
    assert_eq!((report.sent, report.unanswered), (3, 3), "{report:?}");
    assert!(report.statuses.is_empty());
    // The latencies include the unanswered callbacks, with the time until they were given up.
    assert!((1_000.0..1_500.0).contains(&report.latency_ms.p50), "{report:?}");
}

#[tokio::test]
async fn response_other_than_2xx_counts_as_other() {
    let endpoint = Endpoint::answering(503).await;
    let report = load(&endpoint, &["--total=5"]).await;
    assert_eq!((report.sent, report.accepted, report.other), (5, 0, 5), "{report:?}");
    assert_eq!(report.statuses.into_iter().collect::<Vec<_>>(), [(503, 5)]);
}

#[tokio::test]
async fn refused_connection_counts_as_failed_and_has_no_latency() {
    // The listener is dropped, so connections to its port are refused.
    let address = {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().to_string()
    };
    let report = run(&address, &["--total=5"], CancellationToken::new()).await;
    assert_eq!((report.sent, report.failed), (5, 5), "{report:?}");
    assert!(report.latency_ms.max <= 0.0, "{report:?}");
}

#[tokio::test]
async fn latency_of_a_late_callback_counts_from_when_it_was_due() {
    // The first response delays the only connection. The other callbacks are sent late.
    let endpoint = Endpoint::slow(Duration::from_millis(900), 1).await;
    let flags = ["--rate=20", "--total=18", "--connections=1"];
    let report = load(&endpoint, &flags).await;
    assert_eq!((report.sent, report.accepted), (18, 18), "{report:?}");
    // Callbacks are due every 50 ms and sent at 900 ms, so the median one is about 450 ms late.
    assert!(report.latency_ms.p50 >= 400.0, "{report:?}");
}

#[tokio::test]
async fn due_callback_without_a_free_connection_is_unsent() {
    let endpoint = Endpoint::slow(Duration::from_millis(700), u64::MAX).await;
    let flags = ["--rate=100", "--duration=500ms", "--connections=2"];
    let report = load(&endpoint, &flags).await;
    assert_eq!((report.sent, report.unsent), (2, 48), "{report:?}");
}

#[tokio::test]
async fn stopped_run_finishes_callbacks_in_flight_and_reports() {
    let mut endpoint = Endpoint::slow(Duration::from_millis(200), u64::MAX).await;
    let stop = CancellationToken::new();
    let target = endpoint.address.to_string();
    let running = run(&target, &["--rate=5", "--duration=1h"], stop.clone());
    let stopping = async {
        endpoint.next_ids().await;
        endpoint.next_ids().await;
        stop.cancel();
    };
    let (report, ()) = tokio::join!(running, stopping);
    assert_eq!((report.sent, report.accepted), (2, 2), "{report:?}");
    assert_eq!(report.unsent, 0, "{report:?}");
}

#[tokio::test]
async fn ledger_has_every_outcome_and_is_never_overwritten() {
    // The first two responses take longer than `CALLBACK_TIMEOUT`, which is a second.
    let mut endpoint = Endpoint::slow(Duration::from_millis(1_300), 2).await;
    let folder = testkit::Scratch::new("ledger");
    let path = folder.path().join("ledger.jsonl");
    let flag = format!("--ledger={}", path.display());
    let flags = ["--rate=20", "--total=6", "--ids=2", "--unique", &flag];
    let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let report = load(&endpoint, &flags).await;

    let entries = read_ledger(&path);
    let with = |answer| entries.iter().filter(|entry| entry.answer == answer).count();
    assert_eq!((with(Answer::Timeout), with(Answer::Status(200))), (2, 4), "{entries:?}");
    assert_eq!((report.unanswered, report.accepted), (2, 4), "{report:?}");
    let mut sent: Vec<i64> = endpoint.all_ids().concat();
    let mut recorded: Vec<i64> = entries.iter().flat_map(|entry| entry.ids.clone()).collect();
    sent.sort_unstable();
    recorded.sort_unstable();
    assert_eq!(recorded, sent);
    let due: Vec<u64> = entries.iter().map(|entry| entry.due_unix_us).collect();
    let (first, last) = (*due.iter().min().unwrap(), *due.iter().max().unwrap());
    assert!(u128::from(first) >= started.as_micros(), "{first}");
    // Five intervals of 50 ms.
    assert_eq!(last - first, 250_000);
    for entry in entries {
        let is_timeout = entry.answer == Answer::Timeout;
        assert_eq!(entry.latency_us >= 1_000_000, is_timeout, "{entry:?}");
        assert!(entry.late_us <= entry.latency_us, "{entry:?}");
    }

    let target = endpoint.address.to_string();
    let refused = try_run(&target, &["--total=1", &flag], CancellationToken::new()).await;
    assert!(refused.unwrap_err().to_string().contains("cannot create the ledger"));
}

#[tokio::test]
async fn ledger_distinguishes_refused_connection_and_timeout() {
    let port = testkit::free_port();
    let folder = testkit::Scratch::new("ledger");
    let path = folder.path().join("ledger.jsonl");
    let flag = format!("--ledger={}", path.display());
    run(&format!("127.0.0.1:{port}"), &["--total=1", &flag], CancellationToken::new()).await;
    let entries = read_ledger(&path);
    let [Entry { answer: Answer::Failed(reason), .. }] = entries.as_slice() else {
        panic!("{entries:?}");
    };
    assert!(reason.contains("refused"), "{reason}");
}

fn read_ledger(path: &Path) -> Vec<Entry> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
