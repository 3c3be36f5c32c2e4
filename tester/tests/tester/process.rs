//! Tests the tester as a process: settings, metrics, exit codes and output.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use testkit::{Process, http_get, wait_until};

use crate::support::{Endpoint, client};

/// Runs the tester to its end. Returns its exit code and the lines that it printed.
async fn finished(arguments: &[&str]) -> (Option<i32>, Vec<String>) {
    let tester = Process::spawn("tester", &[], arguments);
    let ended = tester.wait().await;
    (ended.code(), tester.log())
}

/// The report of a load, which must be the only line: standard error is not a terminal here, so
/// there is no progress bar.
fn report(log: &[String]) -> Value {
    let [line] = log else { panic!("{log:?}") };
    serde_json::from_str(line).unwrap()
}

#[tokio::test]
async fn inconsistent_settings_end_the_process_with_78() {
    let (code, log) = finished(&["--fail-500-share=0.6", "--fail-429-share=0.6"]).await;
    assert_eq!(code, Some(78));
    assert!(log[0].starts_with("tester: FAIL_500_SHARE=0.6, FAIL_429_SHARE=0.6"), "{log:?}");
    let (code, log) = finished(&["--latency-max=1ms"]).await;
    assert_eq!(code, Some(78));
    let error = "tester: LATENCY_MAX=1ms: must not be below LATENCY_MIN=300ms \
                 (LATENCY_MAX is set by the flag --latency-max; LATENCY_MIN is not set)";
    assert_eq!(log, [error]);
}

#[tokio::test]
async fn error_for_an_address_in_use_names_the_variable() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let flag = format!("--tester-addr={address}");
    let (code, log) = finished(&[flag.as_str(), "--no-partner"]).await;
    assert_eq!(code, Some(70));
    let error = format!("cannot listen on TESTER_ADDR={address}");
    assert!(log.concat().contains(&error), "{log:?}");
}

#[tokio::test]
async fn load_prints_a_json_object_or_lines_of_text() {
    let endpoint = Endpoint::answering(200).await;
    let url = format!("--callback-endpoint=http://{}", endpoint.address);
    let (code, log) = finished(&["load", &url, "--total=5", "--json"]).await;
    assert_eq!(code, Some(0), "{log:?}");
    let report = report(&log);
    assert_eq!((&report["sent"], &report["accepted"]), (&5.into(), &5.into()));
    assert_eq!(report["statuses"]["200"], 5);
    assert!(report["latency_ms"]["p999"].as_f64().unwrap() > 0.0, "{report}");

    let (code, log) = finished(&["load", &url, "--total=5"]).await;
    assert_eq!(code, Some(0), "{log:?}");
    assert!(log[1].starts_with("accepted") && log[1].contains(" 5 "), "{log:?}");
    assert_eq!(log.len(), 7, "{log:?}");
}

#[tokio::test]
async fn interrupted_load_finishes_callbacks_in_flight_and_reports() {
    let mut endpoint = Endpoint::slow(Duration::from_millis(200), u64::MAX).await;
    let url = format!("--callback-endpoint=http://{}", endpoint.address);
    let arguments = ["load", &url, "--rate=5", "--duration=1h", "--json"];
    let load = Process::spawn("tester", &[], &arguments);
    endpoint.next_ids().await;
    load.stop().await;
    let report = report(&load.log());
    assert!(report["accepted"].as_u64() >= Some(1), "{report}");
    assert_eq!(report["accepted"], report["sent"], "{report}");
}

#[tokio::test]
async fn failed_load_logs_one_line_and_ends_with_70() {
    let endpoint = Endpoint::answering(200).await;
    let url = format!("--callback-endpoint=http://{}", endpoint.address);
    // Each write to this device fails.
    let to_full_disk = ["sh", "-c", r#"exec "$0" "$@" > /dev/full"#];
    let arguments = ["load", &url, "--total=1"];
    let load = Process::spawn_wrapped(&to_full_disk, "tester", &[], &arguments);
    assert_eq!(load.wait().await.code(), Some(70));
    let log = load.log();
    assert!(log[0].starts_with("tester: cannot write the report: "), "{log:?}");
    assert_eq!(log.len(), 1, "{log:?}");
}

/// Starts a simulated status API, and also returns its address.
async fn start_api(flags: &[&str]) -> (Process, SocketAddr) {
    let arguments = [&["--tester-addr=127.0.0.1:0", "--no-partner"], flags].concat();
    let tester = Process::spawn("tester", &[], &arguments);
    let line = tester.wait_for_log("status API is listening").await;
    let address = line.split("addr=").nth(1).unwrap().trim().parse().unwrap();
    (tester, address)
}

/// Waits until the metrics hold this line.
async fn metric(tester: &Process, expected: &str) {
    let metrics = async || tester.get("/metrics").await.1;
    wait_until(expected, async || metrics().await.lines().any(|line| line == expected)).await;
}

/// Asserts that the metrics with these names have descriptions.
async fn assert_described(tester: &Process, names: &[&str]) {
    let (_, metrics) = tester.get("/metrics").await;
    for name in names {
        assert!(metrics.contains(&format!("# HELP {name} ")), "no description of {name}");
    }
}

#[tokio::test]
async fn metrics_count_lookups_by_response_and_in_flight() {
    let (tester, api) = start_api(&["--latency-min=0s", "--latency-max=0s"]).await;
    for id in ["2", "4", "5", "five"] {
        http_get(api, &format!("/objects/{id}")).await.unwrap();
    }
    metric(&tester, "lastseen_tester_lookups_total{answer=\"online\"} 2").await;
    metric(&tester, "lastseen_tester_lookups_total{answer=\"offline\"} 1").await;
    metric(&tester, "lastseen_tester_lookups_total{answer=\"bad_request\"} 1").await;
    metric(&tester, "lastseen_tester_lookups_in_flight 0").await;
    let names = ["lastseen_tester_lookups_total", "lastseen_tester_lookups_in_flight"];
    assert_described(&tester, &names).await;
    tester.stop().await;
}

#[tokio::test]
async fn hanging_lookup_is_in_flight_until_disconnect_or_drain() {
    let (tester, api) = start_api(&["--fail-hang-share=1"]).await;
    let url = format!("http://{api}/objects/2");
    let gone = tokio::spawn(client().get(&url).send());
    let staying = tokio::spawn(client().get(&url).send());
    metric(&tester, "lastseen_tester_lookups_in_flight 2").await;
    metric(&tester, "lastseen_tester_lookups_total{answer=\"hang\"} 2").await;
    gone.abort();
    metric(&tester, "lastseen_tester_lookups_in_flight 1").await;
    tester.stop().await;
    assert_eq!(staying.await.unwrap().unwrap().status(), 503);
}

#[tokio::test]
async fn partner_logs_and_counts_each_outcome() {
    let accepting = Endpoint::answering(200).await;
    let refusing = Endpoint::answering(503).await;
    let slow = Endpoint::slow(Duration::from_secs(5), u64::MAX).await;
    for (endpoint, message, status, outcome) in [
        (&accepting, "callback accepted", Some("200"), "accepted"),
        (&refusing, "callback refused", Some("503"), "refused"),
        (&slow, "callback not answered in time", None, "unanswered"),
    ] {
        let url = format!("--callback-endpoint=http://{}", endpoint.address);
        // One callback only, because the next is due in an hour.
        let arguments = [
            url.as_str(),
            "--no-api",
            "--callback-interval=1h",
            "--callback-timeout=300ms",
            "--callback-ids-min=3",
            "--callback-ids-max=3",
        ];
        let tester = Process::spawn("tester", &[], &arguments);
        let line = tester.wait_for_log(message).await;
        assert!(line.contains(" ids=3 ") && line.contains(" elapsed_ms="), "{line}");
        let logged = line.split(" status=").nth(1).map(|rest| &rest[..3]);
        assert_eq!(logged, status, "{line}");
        let counter = format!("lastseen_tester_callbacks_total{{outcome=\"{outcome}\"}} 1");
        metric(&tester, &counter).await;
        assert_described(&tester, &["lastseen_tester_callbacks_total"]).await;
        tester.stop().await;
    }
}
