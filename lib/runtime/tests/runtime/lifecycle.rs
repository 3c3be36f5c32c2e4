//! The life cycle of services and commands, with `runtime-sample` as a process.

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use testkit::{Scratch, free_port, http_get};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::time::timeout;

use crate::DEADLINE;

/// The sample with a free admin port and without this process's environment.
fn sample(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_runtime-sample"));
    command.env_clear().env("ADMIN_ADDR", "127.0.0.1:0").args(arguments).kill_on_drop(true);
    command
}

/// The result of a process: its exit code, standard output and standard error.
struct ProcessResult {
    code: Option<i32>,
    printed: String,
    errors: String,
}

async fn run(mut command: Command) -> ProcessResult {
    let Output { status, stdout, stderr } =
        timeout(DEADLINE, command.output()).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    ProcessResult { code: status.code(), printed: text(stdout), errors: text(stderr) }
}

async fn run_with(arguments: &[&str], variables: &[(&str, &str)]) -> ProcessResult {
    let mut command = sample(arguments);
    command.envs(variables.iter().copied());
    run(command).await
}

/// Starts the process with pipes for its outputs.
fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

async fn expect_exit(mut child: Child, code: i32) {
    let status = timeout(DEADLINE, child.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(code));
}

fn signal(child: &Child, name: &str) {
    let id = child.id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args([name, &id]).status().unwrap().success());
}

/// Runs a command until it prints "waiting", then sends SIGTERM and waits for its end.
async fn run_until_signalled(arguments: &[&str]) -> ProcessResult {
    let mut child = spawn(&mut sample(arguments));
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut printed = String::new();
    timeout(DEADLINE, output.read_line(&mut printed)).await.unwrap().unwrap();
    assert_eq!(printed, "waiting\n");

    signal(&child, "-TERM");
    timeout(DEADLINE, output.read_to_string(&mut printed)).await.unwrap().unwrap();
    let Output { status, stderr, .. } =
        timeout(DEADLINE, child.wait_with_output()).await.unwrap().unwrap();
    ProcessResult { code: status.code(), printed, errors: String::from_utf8(stderr).unwrap() }
}

#[tokio::test]
async fn service_reports_its_end_by_exit_code_and_log() {
    for (ending, code, last_line) in [
        ("success", 0, "stopped"),
        ("unavailable", 69, "outer context: cannot open the file: in use by another process"),
        ("failure", 70, "outer context: inner cause"),
        ("panic", 70, "the main task failed: task "),
        ("critical-panic", 70, "the sample task stopped"),
    ] {
        let service = run(sample(&["--ending", ending])).await;
        assert_eq!(service.code, Some(code), "{ending}: {}", service.errors);
        assert!(service.errors.lines().last().unwrap().contains(last_line), "{}", service.errors);
        assert!(service.errors.contains("starting"), "{}", service.errors);
        assert_eq!(service.printed, "");
    }
}

#[tokio::test]
async fn command_reports_its_end_by_exit_code_and_error() {
    for (ending, code, errors) in [
        ("success", 0, ""),
        (
            "unavailable",
            69,
            "runtime-sample: outer context: cannot open the file: in use by another process\n",
        ),
        ("failure", 70, "runtime-sample: outer context: inner cause\n"),
    ] {
        let command = run_with(&["greet", "--ending", ending], &[("RUST_LOG", "off")]).await;
        assert_eq!((command.code, command.errors.as_str()), (Some(code), errors));
    }
    let command = run(sample(&["greet", "--ending=panic"])).await;
    assert_eq!(command.code, Some(70));
    let last_line = command.errors.lines().last().unwrap();
    assert!(last_line.starts_with("runtime-sample: the main task failed: task "), "{last_line}");
}

/// With `--rejected`, `plan` returns the error that `--ending` selects.
#[tokio::test]
async fn an_error_of_plan_starts_neither_service_nor_command() {
    let error = "runtime-sample: outer context: cannot open the file: in use by another process\n";
    for arguments in [
        &["--rejected", "--ending=unavailable"][..],
        &["greet", "--rejected", "--ending=unavailable"],
    ] {
        let result = run(sample(arguments)).await;
        assert_eq!((result.code, result.errors.as_str()), (Some(69), error));
        assert_eq!(result.printed, "");
    }
}

/// Field case 6.8.
#[tokio::test]
async fn bad_opentelemetry_variables_are_warned_about_and_ignored() {
    let bad = [
        (
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "me:s3cret@localhost:4318",
            "ignored: expected http://",
        ),
        ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "s3cret", "ignored: expected NAME=VALUE"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "ignored: traces are sent by http/protobuf only"),
        ("OTEL_TRACES_SAMPLER", "xray", "ignored: expected always_on, always_off, traceidratio,"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5", "ignored: expected a number from 0 to 1"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "ignored: expected otlp or none"),
        ("OTEL_SDK_DISABLED", "1", "ignored: expected true or false"),
    ];
    let nowhere = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for (endpoint, warnings) in [(Some(format!("http://{nowhere}")), bad.len()), (None, 0)] {
        let mut service = sample(&[]);
        service.envs(bad.map(|(variable, value, _)| (variable, value)));
        let are_traces_on = endpoint.is_some();
        match endpoint {
            Some(endpoint) => service.env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
            None => service.env("OTEL_SDK_DISABLED", "true"),
        };
        let service = run(service).await;
        assert_eq!(service.code, Some(0), "{}", service.errors);
        for (variable, _, warning) in bad.iter().filter(|_| are_traces_on) {
            let warning = format!("{variable} is {warning}");
            assert!(service.errors.contains(&warning), "no {warning:?} in {}", service.errors);
        }
        let logged = service.errors.lines().filter(|line| line.contains("WARN")).count();
        // With traces, another warning may say that the collector cannot be reached.
        let expected = warnings..=warnings + usize::from(are_traces_on);
        assert!(expected.contains(&logged), "{}", service.errors);
        assert!(!service.errors.contains("s3cret"), "{}", service.errors);
    }
}

/// Creates a working directory with this `.env`, below one whose `.env` would prevent the start.
fn directory_with(dot_env: &[u8]) -> Scratch {
    let parent = Scratch::new("dotenv");
    std::fs::create_dir(parent.path().join("here")).unwrap();
    std::fs::write(parent.path().join(".env"), "PACE=0\n").unwrap();
    std::fs::write(dot_env_in(&parent), dot_env).unwrap();
    parent
}

fn dot_env_in(parent: &Scratch) -> PathBuf {
    parent.path().join("here/.env")
}

/// Runs the sample in this working directory.
async fn run_in(parent: &Scratch, variables: &[(&str, &str)]) -> ProcessResult {
    let mut command = sample(&[]);
    command.current_dir(parent.path().join("here")).envs(variables.iter().copied());
    run(command).await
}

/// Field cases 6.1 and 6.3.
#[tokio::test]
async fn dot_env_of_another_application_is_read_for_our_settings() {
    let directory = directory_with(
        b"\xef\xbb\xbfAPP_NAME=My App\r\nNOTHING HERE\r\nAPP_KEY='never closed\r\nPACE=7 \r\nPLACE=pa$$w0rd ",
    );
    let file = dot_env_in(&directory).display().to_string();
    let service = run_in(&directory, &[]).await;
    assert_eq!(service.code, Some(0), "{}", service.errors);
    for text in [
        &format!("read .env file={file} settings=\"PACE, PLACE\""),
        &format!("{file}, line 2: the line is skipped"),
        &format!("{file}, line 3, APP_KEY: the line is skipped because a quote is not closed"),
        "pace=7 place=\"pa$$w0rd\"",
    ] {
        assert!(service.errors.contains(text), "no {text:?} in {}", service.errors);
    }
    assert!(!service.errors.contains("never closed"), "{}", service.errors);
}

/// Field case 6.9.
#[tokio::test]
async fn a_filter_that_would_silence_the_log_is_rejected() {
    for (filter, reason) in [
        ("warning", "warning is not a level; write warn"),
        ("info,warnings", "warnings is not a level; write warn"),
        ("Information", "Information is not a level; write info"),
        ("consumer", "consumer is not a level; write consumer=debug"),
        ("consumer=loud", "expected levels such as info"),
    ] {
        let service = run_with(&[], &[("RUST_LOG", filter)]).await;
        assert_eq!(service.code, Some(78), "{filter}: {}", service.errors);
        let error = format!("runtime-sample: RUST_LOG={filter}: ");
        assert!(service.errors.starts_with(&error), "{}", service.errors);
        assert!(service.errors.contains(reason), "{}", service.errors);
    }
    for filter in ["WARN", "off", "info,", "info, consumer=debug", "[span{id=1}]=trace"] {
        let service = run_with(&[], &[("RUST_LOG", filter)]).await;
        assert_eq!(service.code, Some(0), "{filter}: {}", service.errors);
    }
}

/// Field case 6.9.
#[tokio::test]
async fn the_time_zone_of_dot_env_applies_and_a_wrong_one_is_rejected() {
    // In this POSIX form, XXX is the name of the zone, and -5 means five hours ahead of UTC.
    let service = run_in(&directory_with(b"TZ=XXX-5\n"), &[]).await;
    assert_eq!(service.code, Some(0), "{}", service.errors);
    assert!(service.errors.lines().all(|line| line.contains("+05:00")), "{}", service.errors);
    // The environment overrides `.env`.
    let service = run_in(&directory_with(b"TZ=XXX-5\n"), &[("TZ", "XXX-3")]).await;
    assert!(service.errors.lines().all(|line| line.contains("+03:00")), "{}", service.errors);
    let service = run_in(&directory_with(b""), &[("TZ", "Mars/Base")]).await;
    assert_eq!(service.code, Some(78), "{}", service.errors);
    let reason = "runtime-sample: TZ=Mars/Base: expected a time zone";
    assert!(service.errors.starts_with(reason), "{}", service.errors);
}

/// Field cases 6.1 and 6.3.
#[tokio::test]
async fn a_bad_value_in_dot_env_is_reported_with_file_and_line() {
    for (content, reason) in [
        ("\nPACE=0\n", "PACE=0: expected a whole number from 1 to 100"),
        ("\nPACE='1\n", "PACE: a quote is not closed"),
    ] {
        let directory = directory_with(content.as_bytes());
        let set_in = format!("set in {}, line 2", dot_env_in(&directory).display());
        let service = run_in(&directory, &[]).await;
        assert_eq!(service.code, Some(78), "{}", service.errors);
        let error = format!("runtime-sample: {reason}");
        assert!(service.errors.starts_with(&error), "{}", service.errors);
        assert!(service.errors.contains(&set_in), "{}", service.errors);
    }
}

/// Field case 6.9.
#[tokio::test]
async fn misspelt_variable_is_logged_with_a_suggestion() {
    let directory = directory_with(b"ADMIN_ADR=:1\n");
    let file = dot_env_in(&directory).display().to_string();
    let variables =
        [("DRAIN_TIMEOUTS", "1s"), ("UNRELATED", "1"), ("PACE_PORT", "tcp://10.0.0.1:80")];
    let service = run_in(&directory, &variables).await;
    let warnings: Vec<_> = service.errors.lines().filter(|line| line.contains("WARN")).collect();
    let [one, other] = warnings.as_slice() else { panic!("{}", service.errors) };
    let suggestion = "ADMIN_ADR is not a setting and has no effect; did you mean ADMIN_ADDR?";
    assert!(one.contains(suggestion), "{one}");
    assert!(one.contains(&format!("set in {file}, line 1")), "{one}");
    assert!(other.contains("did you mean DRAIN_TIMEOUT? (set in the environment)"), "{other}");
}

#[tokio::test]
async fn a_command_needs_no_admin_address_and_records_no_metrics() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address_in_use = listener.local_addr().unwrap().to_string();
    let variables = [("ADMIN_ADDR", address_in_use.as_str())];
    let command = run_with(&["greet"], &variables).await;
    assert_eq!((command.code, command.printed.as_str()), (Some(0), "hello, total 0\n"));
    // A service needs the address.
    let service = run_with(&[], &variables).await;
    assert_eq!(service.code, Some(70));
    assert!(service.errors.contains("cannot listen on ADMIN_ADDR"), "{}", service.errors);
}

#[tokio::test]
async fn command_logs_only_warnings_by_default() {
    let log = run_with(&["greet"], &[]).await.errors;
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("WARN") && log.contains("greeted"), "{log}");
    let log = run_with(&["greet"], &[("RUST_LOG", "info")]).await.errors;
    assert_eq!(log.lines().count(), 2, "{log}");
    assert!(log.contains("about to greet"), "{log}");
}

#[tokio::test]
async fn signalled_command_drains_and_exits_0() {
    let command = run_until_signalled(&["wait"]).await;
    assert_eq!((command.code, command.errors.as_str()), (Some(0), ""));
    assert_eq!(command.printed, "waiting\ndrained\n");
}

#[tokio::test]
async fn command_that_does_not_drain_in_time_exits_70() {
    let command = run_until_signalled(&["--drain-timeout=10ms", "hang"]).await;
    assert_eq!(command.code, Some(70));
    let error = "runtime-sample: the drain took longer than DRAIN_TIMEOUT=10ms";
    assert!(command.errors.starts_with(error), "{}", command.errors);
}

#[tokio::test]
async fn service_can_read_the_total_of_its_own_metric() {
    let service = run(sample(&[])).await;
    assert!(service.errors.contains("counted total=5.0"), "{}", service.errors);
}

/// Runs the command `healthcheck` against a server that sends this response.
async fn healthcheck_of(response: &'static str) -> ProcessResult {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        let mut request = String::new();
        // Reads the whole request. Otherwise the close would reset the connection, perhaps before
        // the response is read.
        while !request.ends_with("\r\n\r\n") {
            assert!(stream.read_line(&mut request).await.unwrap() > 0);
        }
        stream.write_all(response.as_bytes()).await.unwrap();
        request
    });
    let result = run_with(&["healthcheck"], &[("ADMIN_ADDR", &address)]).await;
    assert!(server.await.unwrap().starts_with("GET /readyz HTTP/1."));
    result
}

#[tokio::test]
async fn healthcheck_reports_readiness_by_exit_code_and_text() {
    let ready = healthcheck_of("HTTP/1.1 200 OK\r\n\r\nready\nwithout broker: refused\n").await;
    assert_eq!((ready.code, ready.printed.as_str()), (Some(0), "ready\nwithout broker: refused\n"));
    let problem = "HTTP/1.1 503 Service Unavailable\r\n\r\n{\"detail\":\"database: refused\"}";
    let not = healthcheck_of(problem).await;
    assert_eq!((not.code, not.printed.as_str()), (Some(1), "database: refused\n"));
}

#[tokio::test]
async fn healthcheck_without_a_service_names_the_address() {
    let address = format!("127.0.0.1:{}", free_port());
    let result = run_with(&["healthcheck"], &[("ADMIN_ADDR", &address)]).await;
    assert_eq!(result.code, Some(1));
    let error = format!("no answer at ADMIN_ADDR={address}: ");
    assert!(result.printed.starts_with(&error), "{}", result.printed);
}

/// A service that runs with a settings file and prints its pace after each change.
struct RunningService {
    directory: Scratch,
    child: Child,
    printed: Lines<BufReader<ChildStdout>>,
    logged: Lines<BufReader<ChildStderr>>,
    admin: String,
    /// The log lines up to "starting".
    first_lines: Vec<String>,
}

impl RunningService {
    async fn start(content: &str, further: &[&str]) -> Self {
        let scratch = Scratch::new("settings");
        let directory = scratch.path();
        // As Kubernetes mounts a ConfigMap: the settings file is a link through `data`, itself a
        // link to the directory `1`. An update redirects `data` to another directory.
        std::fs::create_dir(directory.join("1")).unwrap();
        std::fs::write(directory.join("1/lastseen.env"), content).unwrap();
        symlink("1", directory.join("data")).unwrap();
        symlink("data/lastseen.env", directory.join("lastseen.env")).unwrap();
        let mut command = sample(&["--ending=drained"]);
        command.args(further).env("LASTSEEN_CONFIG", directory.join("lastseen.env"));
        // The file must override the environment.
        let mut child = spawn(command.env("PACE", "100"));
        let printed = BufReader::new(child.stdout.take().unwrap()).lines();
        let logged = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut service = Self {
            directory: scratch,
            child,
            printed,
            logged,
            admin: String::new(),
            first_lines: Vec::new(),
        };
        let starting = service.logs("starting").await;
        starting.rsplit_once("admin=").unwrap().1.clone_into(&mut service.admin);
        service
    }

    fn write(&self, content: &str) {
        std::fs::write(self.directory.path().join("lastseen.env"), content).unwrap();
    }

    async fn prints(&mut self, expected: &str) {
        let line = timeout(DEADLINE, self.printed.next_line()).await.unwrap().unwrap();
        assert_eq!(line.as_deref(), Some(expected));
    }

    /// Waits for a log line with that text.
    async fn logs(&mut self, text: &str) -> String {
        loop {
            let Ok(line) = timeout(DEADLINE, self.logged.next_line()).await else {
                panic!("no log line contains {text:?}");
            };
            let line = line.unwrap().unwrap();
            if self.admin.is_empty() {
                self.first_lines.push(line.clone());
            }
            if line.contains(text) {
                return line;
            }
        }
    }

    async fn get(&self, path: &str) -> String {
        let reply = http_get(self.admin.parse().unwrap(), path).await.unwrap();
        reply.head + &reply.body
    }

    async fn healthcheck(&self) -> ProcessResult {
        let file = self.directory.path().join("lastseen.env");
        let variables =
            [("LASTSEEN_CONFIG", file.to_str().unwrap()), ("ADMIN_ADDR", self.admin.as_str())];
        run_with(&["healthcheck"], &variables).await
    }

    fn signal(&self, name: &str) {
        signal(&self.child, name);
    }

    async fn stop(self) {
        self.signal("-TERM");
        self.ends_with(0).await;
    }

    async fn ends_with(self, code: i32) {
        expect_exit(self.child, code).await;
    }
}

#[tokio::test]
async fn changed_setting_applies_however_the_file_is_replaced() {
    let mut service = RunningService::start("PACE=1\n", &[]).await;
    service.prints("1").await;
    service.write("PACE=2\n");
    service.prints("2").await;
    // Update the file by redirecting the link to its directory.
    let directory = service.directory.path().to_owned();
    std::fs::create_dir(directory.join("2")).unwrap();
    std::fs::write(directory.join("2/lastseen.env"), "PACE=3\n").unwrap();
    symlink("2", directory.join("new")).unwrap();
    std::fs::rename(directory.join("new"), directory.join("data")).unwrap();
    service.prints("3").await;
    // Replace the file by renaming another one.
    std::fs::write(directory.join("new"), "export PACE='4' # four\n").unwrap();
    std::fs::rename(directory.join("new"), directory.join("lastseen.env")).unwrap();
    service.prints("4").await;
    // Without the setting in the file, the environment variable applies.
    service.write("");
    service.prints("100").await;
    service.stop().await;
}

#[tokio::test]
async fn rejected_settings_file_is_reported_until_it_is_fixed() {
    let mut service = RunningService::start("PACE=1\nPLACE=there\n", &[]).await;
    service.prints("1").await;
    for (content, reason) in [
        ("PACE=0\n", "PACE=0: expected a whole number from 1 to 100"),
        ("PACE=2\nRUST_LOG=every=thing\n", "RUST_LOG=every=thing: expected levels"),
        ("PACE=2\nPLACE\n", "lastseen.env, line 2: it is not of the form NAME=value"),
    ] {
        service.write(content);
        service.logs(reason).await;
        assert!(service.get("/metrics").await.contains("lastseen_settings_refused 1"));
        // A health check must not fail because of the rejected file.
        let healthcheck = service.healthcheck().await;
        assert_eq!(healthcheck.code, Some(0), "{}", healthcheck.errors);
    }
    std::fs::remove_file(service.directory.path().join("lastseen.env")).unwrap();
    service.logs("cannot be read").await;
    let metrics = service.get("/metrics").await;
    assert!(metrics.contains("lastseen_settings_read_total{outcome=\"refused\"} 4"), "{metrics}");
    assert!(service.get("/readyz").await.contains("lastseen.env: cannot be read"));
    service.write("PACE=5\nPLACE=there\n");
    service.prints("5").await;
    assert!(service.get("/metrics").await.contains("lastseen_settings_refused 0"));
    assert!(!service.get("/readyz").await.contains("settings"));
    service.stop().await;
}

#[tokio::test]
async fn settings_without_immediate_effect_are_logged() {
    let mut service = RunningService::start("PLACE=there\nMAX_CONSUMERS=5\n", &["--pace=7"]).await;
    let first_lines = service.first_lines.join("\n");
    let unknown = "not a setting of this process settings=\"MAX_CONSUMERS\"";
    assert!(first_lines.contains(unknown), "{first_lines}");
    service.prints("7").await;
    service.write("PLACE=s3cret@elsewhere\nPACE=8\n");
    let line = service.logs("takes effect with the next start").await;
    assert!(line.contains("settings=\"PLACE\""), "{line}");
    service.logs("a command-line flag overrides it settings=\"PACE\"").await;
    assert!(service.get("/metrics").await.contains("lastseen_settings_awaiting_restart 1"));
    service.write("PLACE=there\n");
    service.logs("settings reloaded").await;
    assert!(service.get("/metrics").await.contains("lastseen_settings_awaiting_restart 0"));
    service.stop().await;
}

#[tokio::test]
async fn log_filter_reloads_and_sighup_rereads_the_file() {
    let mut service = RunningService::start("PACE=1\n", &[]).await;
    service.prints("1").await;
    service.write("PACE=1\nRUST_LOG=debug\n");
    let line = service.logs("settings changed").await;
    assert!(line.contains("changed=\"RUST_LOG=debug\""), "{line}");
    service.logs("DEBUG").await;
    // SIGHUP rereads an unchanged file too.
    service.signal("-HUP");
    service.logs("settings reloaded").await;
    service.write("PACE=9\n");
    service.logs("changed=\"PACE=9, RUST_LOG to its default\"").await;
    service.stop().await;
}

/// Field case 2.6.
#[tokio::test]
async fn service_keeps_working_while_its_log_is_not_read() {
    let mut service = RunningService::start("", &["--pace=7", "--noise=30000"]).await;
    // Printed after all log lines, which have filled the pipe.
    service.prints("7").await;
    let metrics = service.get("/metrics").await;
    let dropped = metrics
        .lines()
        .find_map(|line| line.strip_prefix("lastseen_log_lines_dropped_total{reason=\"unread\"} "));
    assert!(dropped.unwrap().parse::<u32>().unwrap() > 0, "{metrics}");
    service.stop().await;
}

/// Field case 2.6.
#[tokio::test]
async fn repeated_warning_is_limited_and_summarized() {
    let service = run(sample(&["--noise=100"])).await;
    let count = |text: &str| service.errors.lines().filter(|line| line.contains(text)).count();
    // A burst of 20 is allowed, and then one line every five seconds.
    assert!((20..25).contains(&count("WARN runtime_sample: failed again")), "{}", service.errors);
    // These lines have the level INFO. The limit applies only to warnings and errors.
    assert_eq!(count("noise"), 100);
    assert!(count("repeated log lines left out") >= 1, "{}", service.errors);
    assert!(service.errors.lines().last().unwrap().contains("left out"), "{}", service.errors);
}

#[tokio::test]
async fn service_with_a_closed_log_works_and_exits_0() {
    let mut child = spawn(&mut sample(&["--ending=drained", "--rust-log=debug"]));
    drop(child.stderr.take());
    let mut printed = BufReader::new(child.stdout.take().unwrap()).lines();
    timeout(DEADLINE, printed.next_line()).await.unwrap().unwrap();
    signal(&child, "-TERM");
    expect_exit(child, 0).await;
}

#[tokio::test]
async fn sighup_without_a_settings_file_is_ignored() {
    let mut child = spawn(&mut sample(&["--ending=drained"]));
    let mut printed = BufReader::new(child.stdout.take().unwrap()).lines();
    timeout(DEADLINE, printed.next_line()).await.unwrap().unwrap();
    signal(&child, "-HUP");
    signal(&child, "-TERM");
    expect_exit(child, 0).await;
}

#[tokio::test]
async fn bad_settings_file_prevents_the_start() {
    let directory = Scratch::new("settings");
    let file = directory.path().join("lastseen.env");
    std::fs::write(&file, "PACE=0\n").unwrap();
    let path = file.to_str().unwrap();
    let bad = run(sample(&[&format!("--lastseen-config={path}")])).await;
    std::fs::remove_file(&file).unwrap();
    let missing = run(sample(&["--lastseen-config", path])).await;
    assert_eq!((bad.code, missing.code), (Some(78), Some(78)));
    assert!(bad.errors.contains("PACE=0: expected a whole number from 1 to 100"), "{}", bad.errors);
    assert!(bad.errors.contains(&format!("set in {path}, line 1)")), "{}", bad.errors);
    let error = format!("LASTSEEN_CONFIG={path}: cannot be read");
    assert!(missing.errors.contains(&error), "{}", missing.errors);
}

/// A service that ends as soon as the drain begins.
async fn quickly_draining_service(arguments: &[&str]) -> RunningService {
    let mut service = RunningService::start("PACE=1\n", arguments).await;
    service.prints("1").await;
    service
}

// Field case 1.7
#[tokio::test]
async fn sigterm_makes_a_service_not_ready_before_it_drains() {
    let mut service = quickly_draining_service(&["--drain-delay=2s"]).await;
    assert!(service.get("/readyz").await.starts_with("HTTP/1.0 200"));
    service.signal("-TERM");
    service.logs("no longer ready; still accepting requests").await;
    let readyz = service.get("/readyz").await;
    assert!(readyz.starts_with("HTTP/1.0 503") && readyz.contains("draining"), "{readyz}");
    assert!(service.get("/livez").await.starts_with("HTTP/1.0 200"));
    // The service still works: it applies a changed setting.
    service.write("PACE=2\n");
    service.signal("-HUP");
    service.prints("2").await;
    service.logs("draining signal=\"SIGTERM\"").await;
    service.ends_with(0).await;
}

// Field case 1.7
#[tokio::test]
async fn ctrl_c_drains_without_a_delay() {
    let mut service = quickly_draining_service(&["--drain-delay=10m"]).await;
    service.signal("-INT");
    service.logs("draining signal=\"SIGINT\"").await;
    service.ends_with(0).await;
}

// Field case 3.10
#[tokio::test]
async fn simultaneous_signals_count_as_one() {
    let service = quickly_draining_service(&["--drain-delay=1s"]).await;
    let id = service.child.id().unwrap();
    let both = format!("kill -TERM {id}; kill -INT {id}");
    assert!(Command::new("sh").args(["-c", &both]).status().await.unwrap().success());
    service.ends_with(0).await;
}

#[tokio::test]
async fn later_second_signal_stops_the_service_at_once() {
    let mut service = quickly_draining_service(&["--drain-delay=10m"]).await;
    service.signal("-TERM");
    service.logs("no longer ready").await;
    // Signals within 200 ms of the first one count as the same.
    tokio::time::sleep(Duration::from_millis(500)).await;
    service.signal("-TERM");
    service.logs("stopped at once by a second signal (SIGTERM)").await;
    service.ends_with(70).await;
}

// Field case 2.4
#[tokio::test]
async fn silent_admin_connections_do_not_fail_a_healthcheck() {
    let service = quickly_draining_service(&[]).await;
    let mut silent = Vec::new();
    // More than the 64 connections that the admin address allows.
    for _ in 0..80 {
        silent.push(TcpStream::connect(&service.admin).await.unwrap());
    }
    for _ in 0..3 {
        let healthcheck = service.healthcheck().await;
        assert_eq!(healthcheck.code, Some(0), "{}", healthcheck.printed);
        assert!(service.get("/livez").await.starts_with("HTTP/1.0 200"));
    }
    drop(silent);
    service.stop().await;
}
