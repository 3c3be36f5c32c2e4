//! Tests the tester as a process: settings, metrics, exit codes and output.

use std::process::{Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, Command};

use crate::support::{Endpoint, client, soon};

/// The tester with a free admin port and an empty environment.
fn tester(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tester"));
    command
        .env_clear()
        .env("ADMIN_ADDR", "127.0.0.1:0")
        .env("LOG_FORMAT", "json")
        .args(arguments)
        .kill_on_drop(true);
    command
}

async fn finished(arguments: &[&str]) -> (Output, String) {
    let output = soon(tester(arguments).output()).await.unwrap();
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    (output, errors)
}

#[tokio::test]
async fn inconsistent_settings_end_the_process_with_78() {
    let (output, errors) = finished(&["--fail-500-share=0.6", "--fail-429-share=0.6"]).await;
    assert_eq!(output.status.code(), Some(78));
    assert!(errors.starts_with("tester: FAIL_500_SHARE=0.6, FAIL_429_SHARE=0.6"), "{errors}");
    let (output, errors) = finished(&["--latency-max=1ms"]).await;
    assert_eq!(output.status.code(), Some(78));
    assert_eq!(errors, "tester: LATENCY_MAX=1ms: must not be below LATENCY_MIN=300ms\n");
}

#[tokio::test]
async fn error_for_an_address_in_use_names_the_variable() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let flag = format!("--tester-addr={address}");
    let (output, errors) = finished(&[flag.as_str(), "--no-partner"]).await;
    assert_eq!(output.status.code(), Some(70));
    assert!(errors.contains(&format!("cannot listen on TESTER_ADDR={address}")), "{errors}");
}

#[tokio::test]
async fn load_prints_a_json_object_or_lines_of_text() {
    let endpoint = Endpoint::answering(200).await;
    let url = format!("--callback-endpoint=http://{}", endpoint.address);
    let (output, errors) = finished(&["load", &url, "--total=5", "--json"]).await;
    assert_eq!(output.status.code(), Some(0), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["sent"], &report["accepted"]), (&5.into(), &5.into()));
    assert_eq!(report["statuses"]["200"], 5);
    assert!(report["latency_ms"]["p999"].as_f64().unwrap() > 0.0, "{report}");

    let (output, errors) = finished(&["load", &url, "--total=5"]).await;
    assert_eq!(output.status.code(), Some(0), "{errors}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.lines().any(|line| line.starts_with("accepted") && line.contains(" 5 ")),
        "{text}"
    );
    // Standard error is not a terminal here, so there is no progress bar.
    assert_eq!(errors, "");
}

#[tokio::test]
async fn interrupted_load_finishes_callbacks_in_flight_and_reports() {
    let mut endpoint = Endpoint::slow(Duration::from_millis(200), u64::MAX).await;
    let url = format!("--callback-endpoint=http://{}", endpoint.address);
    let mut load = tester(&["load", &url, "--rate=5", "--duration=1h", "--json"]);
    let load = load.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    endpoint.next_ids().await;
    terminate(&load).await;
    let output = soon(load.wait_with_output()).await.unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), errors.as_str()), (Some(0), ""));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["accepted"].as_u64() >= Some(1), "{report}");
    assert_eq!(report["accepted"], report["sent"], "{report}");
}

#[tokio::test]
async fn failed_load_logs_one_line_and_ends_with_70() {
    let endpoint = Endpoint::answering(200).await;
    let url = format!("--callback-endpoint=http://{}", endpoint.address);
    let mut load = tester(&["load", &url, "--total=1"]);
    // Each write to this device fails.
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let load = load.stdout(full).stderr(Stdio::piped()).spawn().unwrap();
    let output = soon(load.wait_with_output()).await.unwrap();
    assert_eq!(output.status.code(), Some(70));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.starts_with("tester: cannot write the report: "), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
}

/// Sends SIGTERM.
async fn terminate(child: &Child) {
    let id = child.id().unwrap().to_string();
    assert!(Command::new("kill").arg(id).status().await.unwrap().success());
}

/// A running simulation.
struct Running {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let mut child = tester(arguments).stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, log }
    }

    /// Reads the log up to the line with this message.
    async fn logged(&mut self, message: &str) -> Value {
        loop {
            let line = soon(self.log.next_line()).await.unwrap().expect("the log has ended");
            let line: Value = serde_json::from_str(&line).unwrap();
            if line["message"] == message {
                return line;
            }
        }
    }

    /// Sends SIGTERM and waits for the end.
    async fn terminate(mut self) -> Option<i32> {
        terminate(&self.child).await;
        soon(self.child.wait()).await.unwrap().code()
    }
}

async fn get(url: &str) -> String {
    let response = client().get(url).send().await.unwrap();
    String::from_utf8(response.bytes().await.unwrap().to_vec()).unwrap()
}

/// Waits until the metrics hold this line.
async fn metric(admin: &str, expected: &str) {
    let url = format!("http://{admin}/metrics");
    let mut metrics = String::new();
    let found = async {
        loop {
            metrics = get(&url).await;
            if metrics.lines().any(|line| line == expected) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let found = tokio::time::timeout(Duration::from_secs(10), found).await;
    assert!(found.is_ok(), "no line {expected} in\n{metrics}");
}

/// Asserts that the metrics with these names have descriptions.
async fn assert_described(admin: &str, names: &[&str]) {
    let metrics = get(&format!("http://{admin}/metrics")).await;
    for name in names {
        assert!(metrics.contains(&format!("# HELP {name} ")), "no description of {name}");
    }
}

#[tokio::test]
async fn metrics_count_lookups_by_response_and_in_flight() {
    let flags = ["--tester-addr=127.0.0.1:0", "--latency-min=0s", "--latency-max=0s"];
    let mut tester = Running::start(&[&flags[..], &["--no-partner"]].concat());
    let admin = tester.logged("starting").await["admin"].as_str().unwrap().to_owned();
    let api = tester.logged("status API is listening").await["addr"].as_str().unwrap().to_owned();
    for id in ["2", "4", "5", "five"] {
        get(&format!("http://{api}/objects/{id}")).await;
    }
    metric(&admin, "lastseen_tester_lookups_total{answer=\"online\"} 2").await;
    metric(&admin, "lastseen_tester_lookups_total{answer=\"offline\"} 1").await;
    metric(&admin, "lastseen_tester_lookups_total{answer=\"bad_request\"} 1").await;
    metric(&admin, "lastseen_tester_lookups_in_flight 0").await;
    assert_described(
        &admin,
        &["lastseen_tester_lookups_total", "lastseen_tester_lookups_in_flight"],
    )
    .await;
    assert_eq!(tester.terminate().await, Some(0));
}

#[tokio::test]
async fn hanging_lookup_is_in_flight_until_disconnect_or_drain() {
    let flags = ["--tester-addr=127.0.0.1:0", "--no-partner", "--fail-hang-share=1"];
    let mut tester = Running::start(&flags);
    let admin = tester.logged("starting").await["admin"].as_str().unwrap().to_owned();
    let api = tester.logged("status API is listening").await["addr"].as_str().unwrap().to_owned();
    let url = format!("http://{api}/objects/2");
    let gone = tokio::spawn(client().get(&url).send());
    let staying = tokio::spawn(client().get(&url).send());
    metric(&admin, "lastseen_tester_lookups_in_flight 2").await;
    metric(&admin, "lastseen_tester_lookups_total{answer=\"hang\"} 2").await;
    gone.abort();
    metric(&admin, "lastseen_tester_lookups_in_flight 1").await;
    assert_eq!(tester.terminate().await, Some(0));
    assert_eq!(staying.await.unwrap().unwrap().status(), 503);
}

#[tokio::test]
async fn partner_logs_and_counts_each_outcome() {
    let accepting = Endpoint::answering(200).await;
    let refusing = Endpoint::answering(503).await;
    let slow = Endpoint::slow(Duration::from_secs(5), u64::MAX).await;
    for (endpoint, message, status, outcome) in [
        (&accepting, "callback accepted", Some(200), "accepted"),
        (&refusing, "callback refused", Some(503), "refused"),
        (&slow, "callback not answered in time", None, "unanswered"),
    ] {
        let url = format!("--callback-endpoint=http://{}", endpoint.address);
        // One callback only: the next is an hour away.
        let mut tester = Running::start(&[
            url.as_str(),
            "--no-api",
            "--callback-interval=1h",
            "--callback-timeout=300ms",
            "--callback-ids-min=3",
            "--callback-ids-max=3",
        ]);
        let admin = tester.logged("starting").await["admin"].as_str().unwrap().to_owned();
        let line = tester.logged(message).await;
        assert_eq!(line["ids"], 3);
        assert_eq!(line["status"].as_u64(), status);
        assert!(line["elapsed_ms"].is_u64() || line["elapsed_ms"].is_string(), "{line}");
        let counter = format!("lastseen_tester_callbacks_total{{outcome=\"{outcome}\"}} 1");
        metric(&admin, &counter).await;
        assert_described(&admin, &["lastseen_tester_callbacks_total"]).await;
        assert_eq!(tester.terminate().await, Some(0));
    }
}
