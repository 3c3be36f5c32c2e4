use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use testkit::{Process, wait_for};
use tokio::net::TcpStream;

#[tokio::test]
async fn process_exposes_log_readiness_and_metrics_and_drains() {
    let sample = Process::spawn("testkit-sample", &[("GREETING", "hello".to_owned())], &[]);
    let line = sample.wait_for_log("greeting=").await;
    assert!(line.contains(r#"greeting="hello""#), "{line}");
    assert!(line.contains("lastseen-testkit-sample-"), "not in its own folder: {line}");
    sample.ready().await;
    assert_eq!(sample.get("/livez").await, (200, "alive\n".to_owned()));
    assert_eq!(sample.get("/nothing").await.0, 404);
    assert!((sample.metric("sample_total").await - 5.0).abs() < f64::EPSILON);
    assert!((sample.metric(r#"sample_total{kind="b"}"#).await - 3.0).abs() < f64::EPSILON);
    assert!(sample.metric("absent_total").await.abs() < f64::EPSILON);
    assert!((500..500_000).contains(&sample.rss_kib()), "{} KiB", sample.rss_kib());

    assert!(sample.peak_rss_kib() >= sample.rss_kib());

    assert!(sample.is_running());
    sample.terminate();
    let ended = sample.wait().await;
    assert!(ended.success(), "{ended}");
    assert!(sample.log().last().unwrap().contains("stopped"));
}

#[tokio::test]
async fn process_gets_only_the_given_environment_variables() {
    // Cargo sets CARGO_MANIFEST_DIR for this test; HOME is set on every machine.
    let sample = Process::spawn("testkit-sample", &[], &["--greeting", "hi"]);
    sample.wait_for_log("greeting=").await;
    let environment = std::fs::read_to_string(format!("/proc/{}/environ", sample.pid())).unwrap();
    let mut names: Vec<_> =
        environment.split_terminator('\0').filter_map(|v| v.split('=').next()).collect();
    names.sort_unstable();
    assert_eq!(names, ["ADMIN_ADDR", "DRAIN_DELAY", "PATH"]);
}

#[tokio::test]
async fn paused_process_does_nothing_until_it_is_resumed() {
    let sample = Process::spawn("testkit-sample", &[], &[]);
    sample.ready().await;
    sample.pause().await;
    let response = tokio::time::timeout(Duration::from_millis(300), sample.get("/livez"));
    assert!(response.await.is_err(), "it answers");
    sample.resume();
    assert_eq!(sample.get("/livez").await.0, 200);
}

#[tokio::test]
async fn killed_or_dropped_process_has_ended() {
    let sample = Process::spawn("testkit-sample", &[], &[]);
    sample.admin().await;
    sample.kill();
    assert!(!sample.is_running());
    assert_eq!(sample.wait().await.signal(), Some(9));

    let sample = Process::spawn("testkit-sample", &[], &[]);
    let admin = sample.admin().await;
    drop(sample);
    wait_until_closed(admin).await;
}

async fn wait_until_closed(address: SocketAddr) {
    wait_for("its port is closed", async || TcpStream::connect(address).await.err()).await;
}

#[tokio::test]
#[should_panic(expected = "testkit-sample ended without")]
async fn waiting_for_a_line_of_an_ended_process_fails_at_once() {
    let sample = Process::spawn("testkit-sample", &[], &["--no-such-flag"]);
    sample.wait_for_log("never").await;
}

#[test]
#[should_panic(expected = "run `cargo build --workspace`")]
fn missing_binary_fails_with_the_build_command() {
    Process::spawn("no-such-service", &[], &[]);
}

/// The test runs itself again as a process, and kills that process while it holds a [`Process`].
#[tokio::test]
async fn process_ends_when_its_test_is_killed() {
    const IS_INNER: &str = "TESTBED_IS_TO_BE_KILLED";
    if std::env::var_os(IS_INNER).is_some() {
        let sample = Process::spawn("testkit-sample", &[], &[]);
        println!("admin address {}", sample.admin().await);
        // It also ends if it is not killed.
        tokio::time::sleep(Duration::from_secs(30)).await;
        return;
    }
    let mut test = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "process::process_ends_when_its_test_is_killed"])
        .env(IS_INNER, "yes")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(test.stdout.take().unwrap()).lines();
    let address = lines.map_while(Result::ok).find_map(|line| {
        line.split("admin address ").nth(1).and_then(|rest| rest.parse::<SocketAddr>().ok())
    });
    test.kill().unwrap();
    test.wait().unwrap();
    wait_until_closed(address.unwrap()).await;
}
