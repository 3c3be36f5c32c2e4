//! The life cycle of services and commands, with `service-sample` as a process.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::Command;
use tokio::time::timeout;

/// Far more than anything here needs, because a machine that runs all tests at once is slow.
const DEADLINE: Duration = Duration::from_secs(30);

/// The sample with a free admin port and nothing of this process's environment.
fn sample(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_service-sample"));
    command.env_clear().env("ADMIN_ADDR", "127.0.0.1:0").args(arguments).kill_on_drop(true);
    command
}

/// How a process ended.
struct Ended {
    code: Option<i32>,
    printed: String,
    errors: String,
}

async fn ended(mut command: Command) -> Ended {
    let Output { status, stdout, stderr } =
        timeout(DEADLINE, command.output()).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended { code: status.code(), printed: text(stdout), errors: text(stderr) }
}

/// Runs a command that waits, sends it SIGTERM as soon as it does, and lets it end.
async fn ended_by_a_signal(arguments: &[&str]) -> Ended {
    let pipes = |command: &mut Command| {
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut child = pipes(&mut sample(arguments));
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut printed = String::new();
    timeout(DEADLINE, output.read_line(&mut printed)).await.unwrap().unwrap();
    assert_eq!(printed, "waiting\n");

    let id = child.id().unwrap().to_string();
    assert!(Command::new("kill").arg(id).status().await.unwrap().success());
    timeout(DEADLINE, output.read_to_string(&mut printed)).await.unwrap().unwrap();
    let Output { status, stderr, .. } =
        timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    Ended { code: status.code(), printed, errors: String::from_utf8(stderr).unwrap() }
}

#[tokio::test]
async fn a_service_tells_by_its_exit_code_and_its_log_how_it_ended() {
    for (ending, code, last_words) in [
        ("well", 0, "stopped"),
        ("unavailable", 69, "cannot end well: cannot have it: another one has it"),
        ("failure", 70, "cannot end well: no luck"),
        ("panic", 70, "died: task "),
    ] {
        let service = ended(sample(&["--ending", ending])).await;
        assert_eq!(service.code, Some(code), "{ending}: {}", service.errors);
        assert!(service.errors.lines().last().unwrap().contains(last_words), "{}", service.errors);
        assert!(service.errors.contains("starting"), "{}", service.errors);
        assert_eq!(service.printed, "");
    }
}

#[tokio::test]
async fn a_command_tells_by_its_exit_code_how_it_ended_and_prints_what_it_failed_with() {
    for (ending, code, errors) in [
        ("well", 0, ""),
        (
            "unavailable",
            69,
            "service-sample: cannot end well: cannot have it: another one has it\n",
        ),
        ("failure", 70, "service-sample: cannot end well: no luck\n"),
    ] {
        let mut greet = sample(&["greet", "--ending", ending]);
        greet.env("RUST_LOG", "off");
        let command = ended(greet).await;
        assert_eq!((command.code, command.errors.as_str()), (Some(code), errors));
    }
    let command = ended(sample(&["greet", "--ending=panic"])).await;
    assert_eq!(command.code, Some(70));
    let last_words = command.errors.lines().last().unwrap();
    assert!(last_words.starts_with("service-sample: died: task "), "{last_words}");
}

#[tokio::test]
async fn settings_that_are_refused_begin_neither_a_service_nor_a_command() {
    let why = "service-sample: cannot end well: cannot have it: another one has it\n";
    for arguments in [
        &["--refused", "--ending=unavailable"][..],
        &["greet", "--refused", "--ending=unavailable"],
    ] {
        let refused = ended(sample(arguments)).await;
        assert_eq!((refused.code, refused.errors.as_str()), (Some(69), why));
        assert_eq!(refused.printed, "");
    }
}

#[tokio::test]
async fn a_bad_setting_of_the_traces_stops_the_start_and_no_secret_is_shown() {
    for (variable, value, said) in [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4318", "=localhost:4318: expected http://"),
        ("OTEL_EXPORTER_OTLP_HEADERS", "s3cret", "=***: expected NAME=VALUE"),
        ("OTEL_TRACES_SAMPLER", "some", "=some: allowed are always_on, always_off, traceidratio,"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5", "=1.5: expected a number from 0 to 1"),
    ] {
        let mut service = sample(&[]);
        service.env(variable, value);
        let service = ended(service).await;
        assert_eq!(service.code, Some(78), "{}", service.errors);
        let said = format!("service-sample: {variable}{said}");
        assert!(service.errors.starts_with(&said), "{}", service.errors);
        assert!(!service.errors.contains("s3cret"), "{}", service.errors);
    }
}

#[tokio::test]
async fn a_command_needs_no_admin_address_and_records_no_metrics() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let with_it_taken = |arguments| {
        let mut command = sample(arguments);
        command.env("ADMIN_ADDR", &taken);
        command
    };
    let command = ended(with_it_taken(&["greet"])).await;
    assert_eq!((command.code, command.printed.as_str()), (Some(0), "hello, total 0\n"));
    // Which a service does need.
    let service = ended(with_it_taken(&[])).await;
    assert_eq!(service.code, Some(70));
    assert!(service.errors.contains("cannot listen on ADMIN_ADDR"), "{}", service.errors);
}

#[tokio::test]
async fn a_command_logs_warnings_only_unless_told_otherwise() {
    let told = |filter: Option<&str>| {
        let mut command = sample(&["greet"]);
        command.envs(filter.map(|filter| ("RUST_LOG", filter)));
        ended(command)
    };
    let usual = told(None).await.errors;
    assert_eq!(usual.lines().count(), 1, "{usual}");
    assert!(usual.contains("WARN") && usual.contains("have greeted"), "{usual}");
    let more = told(Some("info")).await.errors;
    assert_eq!(more.lines().count(), 2, "{more}");
    assert!(more.contains("about to greet"), "{more}");
}

#[tokio::test]
async fn a_command_that_gets_a_signal_drains_and_ends_well() {
    let command = ended_by_a_signal(&["wait"]).await;
    assert_eq!((command.code, command.errors.as_str()), (Some(0), ""));
    assert_eq!(command.printed, "waiting\ndrained\n");
}

#[tokio::test]
async fn a_command_that_does_not_drain_in_time_is_given_up() {
    let command = ended_by_a_signal(&["--drain-timeout=10ms", "hang"]).await;
    assert_eq!(command.code, Some(70));
    let told = "service-sample: the drain took longer than DRAIN_TIMEOUT=10ms";
    assert!(command.errors.starts_with(told), "{}", command.errors);
}

#[tokio::test]
async fn a_service_can_look_up_the_total_of_its_own_metric() {
    let service = ended(sample(&[])).await;
    assert!(service.errors.contains("counted total=5.0"), "{}", service.errors);
}

/// What the command `healthcheck` says about an address where that is answered to whoever asks.
async fn checked(answer: &'static str) -> Ended {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answering = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        let mut request = String::new();
        // To its end, or the close would reset the connection, maybe before the answer is read.
        while !request.ends_with("\r\n\r\n") {
            assert!(stream.read_line(&mut request).await.unwrap() > 0);
        }
        stream.write_all(answer.as_bytes()).await.unwrap();
        request
    });
    let mut command = sample(&["healthcheck"]);
    command.env("ADMIN_ADDR", address);
    let ended = ended(command).await;
    assert!(answering.await.unwrap().starts_with("GET /readyz HTTP/1."));
    ended
}

#[tokio::test]
async fn a_healthcheck_says_by_0_or_1_whether_the_service_is_ready_and_why_not() {
    let ready = checked("HTTP/1.1 200 OK\r\n\r\nready\nwithout broker: refused\n").await;
    assert_eq!((ready.code, ready.printed.as_str()), (Some(0), "ready\nwithout broker: refused\n"));
    let problem = "HTTP/1.1 503 Service Unavailable\r\n\r\n{\"detail\":\"database: refused\"}";
    let not = checked(problem).await;
    assert_eq!((not.code, not.printed.as_str()), (Some(1), "database: refused\n"));
}

#[tokio::test]
async fn a_healthcheck_of_nobody_fails_and_says_where_it_asked() {
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let mut command = sample(&["healthcheck"]);
    command.env("ADMIN_ADDR", &address);
    let ended = ended(command).await;
    assert_eq!(ended.code, Some(1));
    let said = format!("no answer at ADMIN_ADDR={address}: ");
    assert!(ended.printed.starts_with(&said), "{}", ended.printed);
}
