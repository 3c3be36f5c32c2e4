//! The life cycle of services and commands, with `service-sample` as a process.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStderr, ChildStdout, Command};
use tokio::time::timeout;

/// Far longer than any step takes, because a machine that runs all tests at once is slow.
const DEADLINE: Duration = Duration::from_secs(30);

/// The sample with a free admin port and without this process's environment.
fn sample(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_service-sample"));
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

/// Runs a command until it prints "waiting", then sends SIGTERM and waits for its end.
async fn run_until_signalled(arguments: &[&str]) -> ProcessResult {
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
    ProcessResult { code: status.code(), printed, errors: String::from_utf8(stderr).unwrap() }
}

#[tokio::test]
async fn service_reports_its_end_by_exit_code_and_log() {
    for (ending, code, last_line) in [
        ("success", 0, "stopped"),
        ("unavailable", 69, "outer context: cannot open the file: in use by another process"),
        ("failure", 70, "outer context: inner cause"),
        ("panic", 70, "the main task failed: task "),
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
            "service-sample: outer context: cannot open the file: in use by another process\n",
        ),
        ("failure", 70, "service-sample: outer context: inner cause\n"),
    ] {
        let mut greet = sample(&["greet", "--ending", ending]);
        greet.env("RUST_LOG", "off");
        let command = run(greet).await;
        assert_eq!((command.code, command.errors.as_str()), (Some(code), errors));
    }
    let command = run(sample(&["greet", "--ending=panic"])).await;
    assert_eq!(command.code, Some(70));
    let last_line = command.errors.lines().last().unwrap();
    assert!(last_line.starts_with("service-sample: the main task failed: task "), "{last_line}");
}

#[tokio::test]
async fn rejected_settings_start_neither_service_nor_command() {
    let error = "service-sample: outer context: cannot open the file: in use by another process\n";
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
        let is_on = endpoint.is_some();
        service.envs(endpoint.map(|endpoint| ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)));
        if !is_on {
            service.env("OTEL_SDK_DISABLED", "true");
        }
        let service = run(service).await;
        assert_eq!(service.code, Some(0), "{}", service.errors);
        for (variable, _, warning) in bad.iter().filter(|_| is_on) {
            let warning = format!("{variable} is {warning}");
            assert!(service.errors.contains(&warning), "no {warning:?} in {}", service.errors);
        }
        let logged = service.errors.lines().filter(|line| line.contains("WARN")).count();
        assert!(logged == warnings || is_on && logged == warnings + 1, "{}", service.errors);
        assert!(!service.errors.contains("s3cret"), "{}", service.errors);
    }
}

/// Creates a working directory with this `.env`, below one whose `.env` would prevent the start.
fn directory_with(dot_env: &[u8]) -> PathBuf {
    static MADE: AtomicU32 = AtomicU32::new(0);
    let name = format!("lastseen-dotenv-{}-{}", std::process::id(), MADE.fetch_add(1, Relaxed));
    let parent = std::env::temp_dir().join(name);
    let directory = parent.join("here");
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(parent.join(".env"), "PACE=0\n").unwrap();
    std::fs::write(directory.join(".env"), dot_env).unwrap();
    directory
}

/// Runs the sample in this directory and removes it.
async fn run_in(directory: &PathBuf, variables: &[(&str, &str)]) -> ProcessResult {
    let mut command = sample(&[]);
    command.current_dir(directory).envs(variables.iter().copied());
    let result = run(command).await;
    std::fs::remove_dir_all(directory.parent().unwrap()).unwrap();
    result
}

/// Field cases 6.1 and 6.3.
#[tokio::test]
async fn dot_env_of_another_application_is_read_for_our_settings() {
    let directory = directory_with(
        b"\xef\xbb\xbfAPP_NAME=My App\r\nNOTHING HERE\r\nAPP_KEY='never closed\r\nPACE=7 \r\nPLACE=pa$$w0rd ",
    );
    let file = directory.join(".env").display().to_string();
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
        let mut service = sample(&[]);
        service.env("RUST_LOG", filter);
        let service = run(service).await;
        assert_eq!(service.code, Some(78), "{filter}: {}", service.errors);
        assert!(
            service.errors.starts_with(&format!("service-sample: RUST_LOG={filter}: ")),
            "{}",
            service.errors
        );
        assert!(service.errors.contains(reason), "{}", service.errors);
    }
    for filter in ["WARN", "off", "info,", "info, consumer=debug", "[span{id=1}]=trace"] {
        let mut service = sample(&[]);
        service.env("RUST_LOG", filter);
        let service = run(service).await;
        assert_eq!(service.code, Some(0), "{filter}: {}", service.errors);
    }
}

/// Field case 6.9.
#[tokio::test]
async fn the_time_zone_of_dot_env_applies_and_a_wrong_one_is_rejected() {
    let service = run_in(&directory_with(b"TZ=XXX-5\n"), &[]).await;
    assert_eq!(service.code, Some(0), "{}", service.errors);
    assert!(service.errors.lines().all(|line| line.contains("+05:00")), "{}", service.errors);
    let service = run_in(&directory_with(b"TZ=XXX-5\n"), &[("TZ", "XXX-3")]).await;
    assert!(service.errors.lines().all(|line| line.contains("+03:00")), "{}", service.errors);
    let service = run_in(&directory_with(b""), &[("TZ", "Mars/Base")]).await;
    assert_eq!(service.code, Some(78), "{}", service.errors);
    let reason = "service-sample: TZ=Mars/Base: expected a time zone";
    assert!(service.errors.starts_with(reason), "{}", service.errors);
}

/// Field cases 6.1 and 6.3.
#[tokio::test]
async fn a_bad_value_in_dot_env_is_reported_with_file_and_line() {
    for (content, reason) in [
        ("\nPACE=0\n", "PACE=0: expected a number from 1 to 100"),
        ("\nPACE='1\n", "PACE: a quote is not closed"),
    ] {
        let directory = directory_with(content.as_bytes());
        let place = format!("set in {}, line 2", directory.join(".env").display());
        let service = run_in(&directory, &[]).await;
        assert_eq!(service.code, Some(78), "{}", service.errors);
        assert!(
            service.errors.starts_with(&format!("service-sample: {reason}")),
            "{}",
            service.errors
        );
        assert!(service.errors.contains(&place), "{}", service.errors);
    }
}

/// Field case 6.9.
#[tokio::test]
async fn misspelt_variable_is_logged_with_a_suggestion() {
    let directory = directory_with(b"ADMIN_ADR=:1\n");
    let file = directory.join(".env").display().to_string();
    let variables =
        [("DRAIN_TIMEOUTS", "1s"), ("UNRELATED", "1"), ("PACE_PORT", "tcp://10.0.0.1:80")];
    let service = run_in(&directory, &variables).await;
    let warnings: Vec<_> = service.errors.lines().filter(|line| line.contains("WARN")).collect();
    let [one, other] = warnings.as_slice() else { panic!("{}", service.errors) };
    assert!(
        one.contains("ADMIN_ADR is not a setting and has no effect; did you mean ADMIN_ADDR?"),
        "{one}"
    );
    assert!(one.contains(&format!("set in {file}, line 1")), "{one}");
    assert!(other.contains("did you mean DRAIN_TIMEOUT? (set in the environment)"), "{other}");
}

#[tokio::test]
async fn a_command_needs_no_admin_address_and_records_no_metrics() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let on_taken_address = |arguments| {
        let mut command = sample(arguments);
        command.env("ADMIN_ADDR", &taken);
        command
    };
    let command = run(on_taken_address(&["greet"])).await;
    assert_eq!((command.code, command.printed.as_str()), (Some(0), "hello, total 0\n"));
    // A service needs the address.
    let service = run(on_taken_address(&[])).await;
    assert_eq!(service.code, Some(70));
    assert!(service.errors.contains("cannot listen on ADMIN_ADDR"), "{}", service.errors);
}

#[tokio::test]
async fn command_logs_only_warnings_by_default() {
    let run_with = |filter: Option<&str>| {
        let mut command = sample(&["greet"]);
        command.envs(filter.map(|filter| ("RUST_LOG", filter)));
        run(command)
    };
    let log = run_with(None).await.errors;
    assert_eq!(log.lines().count(), 1, "{log}");
    assert!(log.contains("WARN") && log.contains("greeted"), "{log}");
    let log = run_with(Some("info")).await.errors;
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
    let error = "service-sample: the drain took longer than DRAIN_TIMEOUT=10ms";
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
    let mut command = sample(&["healthcheck"]);
    command.env("ADMIN_ADDR", address);
    let result = run(command).await;
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
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    let mut command = sample(&["healthcheck"]);
    command.env("ADMIN_ADDR", &address);
    let result = run(command).await;
    assert_eq!(result.code, Some(1));
    let error = format!("no answer at ADMIN_ADDR={address}: ");
    assert!(result.printed.starts_with(&error), "{}", result.printed);
}

/// A service that runs with a settings file and prints its pace after each change.
struct RunningService {
    directory: PathBuf,
    child: Child,
    printed: Lines<BufReader<ChildStdout>>,
    logged: Lines<BufReader<ChildStderr>>,
    admin: String,
    /// The log lines up to "starting".
    first_lines: Vec<String>,
}

impl RunningService {
    async fn start(content: &str, further: &[&str]) -> Self {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("lastseen-settings-{}-{}", std::process::id(), STARTED.fetch_add(1, Relaxed));
        let directory = std::env::temp_dir().join(name);
        // As a mounted ConfigMap: an update redirects the link to its directory.
        std::fs::create_dir_all(directory.join("1")).unwrap();
        std::fs::write(directory.join("1/lastseen.env"), content).unwrap();
        symlink("1", directory.join("data")).unwrap();
        symlink("data/lastseen.env", directory.join("lastseen.env")).unwrap();
        let mut command = sample(&["--ending=drained"]);
        command.args(further).env("LASTSEEN_CONFIG", directory.join("lastseen.env"));
        // The file must override the environment.
        command.env("PACE", "100").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let printed = BufReader::new(child.stdout.take().unwrap()).lines();
        let logged = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut service = Self {
            directory,
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
        std::fs::write(self.directory.join("lastseen.env"), content).unwrap();
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
        let mut stream = TcpStream::connect(&self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        timeout(DEADLINE, stream.read_to_string(&mut response)).await.unwrap().unwrap();
        response
    }

    fn signal(&self, signal: &str) {
        let id = self.child.id().unwrap().to_string();
        let sent = std::process::Command::new("kill").args([signal, &id]).status().unwrap();
        assert!(sent.success());
    }

    async fn stop(self) {
        self.signal("-TERM");
        self.ends_with(0).await;
    }

    async fn ends_with(mut self, code: i32) {
        let result = timeout(DEADLINE, self.child.wait()).await.unwrap().unwrap();
        assert_eq!(result.code(), Some(code));
        std::fs::remove_dir_all(&self.directory).unwrap();
    }
}

#[tokio::test]
async fn changed_setting_applies_however_the_file_is_replaced() {
    let mut service = RunningService::start("PACE=1\n", &[]).await;
    service.prints("1").await;
    service.write("PACE=2\n");
    service.prints("2").await;
    // By redirecting the link to the directory.
    let directory = service.directory.clone();
    std::fs::create_dir(directory.join("2")).unwrap();
    std::fs::write(directory.join("2/lastseen.env"), "PACE=3\n").unwrap();
    symlink("2", directory.join("new")).unwrap();
    std::fs::rename(directory.join("new"), directory.join("data")).unwrap();
    service.prints("3").await;
    // By renaming another file.
    std::fs::write(directory.join("new"), "export PACE='4' # four\n").unwrap();
    std::fs::rename(directory.join("new"), directory.join("lastseen.env")).unwrap();
    service.prints("4").await;
    // Without the setting in the file, that of the environment applies.
    service.write("");
    service.prints("100").await;
    service.stop().await;
}

#[tokio::test]
async fn rejected_settings_file_is_reported_until_it_is_fixed() {
    let mut service = RunningService::start("PACE=1\nPLACE=there\n", &[]).await;
    service.prints("1").await;
    for (content, reason) in [
        ("PACE=0\n", "PACE=0: expected a number from 1 to 100"),
        ("PACE=2\nRUST_LOG=every=thing\n", "RUST_LOG=every=thing: expected levels"),
        ("PACE=2\nPLACE\n", "lastseen.env, line 2: it is not of the form NAME=value"),
    ] {
        service.write(content);
        service.logs(reason).await;
        assert!(service.get("/metrics").await.contains("lastseen_settings_refused 1"));
        // A health check must not fail because of the rejected file.
        let mut command = sample(&["healthcheck"]);
        command.env("LASTSEEN_CONFIG", service.directory.join("lastseen.env"));
        command.env("ADMIN_ADDR", &service.admin);
        let healthcheck = run(command).await;
        assert_eq!(healthcheck.code, Some(0), "{}", healthcheck.errors);
    }
    std::fs::remove_file(service.directory.join("lastseen.env")).unwrap();
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
    assert!((20..25).contains(&count("WARN service_sample: failed again")), "{}", service.errors);
    assert_eq!(count("noise"), 100);
    assert!(count("repeated log lines left out") >= 1, "{}", service.errors);
    assert!(service.errors.lines().last().unwrap().contains("left out"), "{}", service.errors);
}

#[tokio::test]
async fn service_with_a_closed_log_works_and_exits_0() {
    let mut command = sample(&["--ending=drained", "--rust-log=debug"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    let mut printed = BufReader::new(child.stdout.take().unwrap()).lines();
    timeout(DEADLINE, printed.next_line()).await.unwrap().unwrap();
    let id = child.id().unwrap().to_string();
    assert!(Command::new("kill").arg(id).status().await.unwrap().success());
    let result = timeout(DEADLINE, child.wait()).await.unwrap().unwrap();
    assert_eq!(result.code(), Some(0));
}

#[tokio::test]
async fn sighup_without_a_settings_file_is_ignored() {
    let mut command = sample(&["--ending=drained"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut printed = BufReader::new(child.stdout.take().unwrap()).lines();
    timeout(DEADLINE, printed.next_line()).await.unwrap().unwrap();
    let id = child.id().unwrap().to_string();
    for signal in ["-HUP", "-TERM"] {
        let sent = Command::new("kill").args([signal, &id]).status().await.unwrap();
        assert!(sent.success());
    }
    let result = timeout(DEADLINE, child.wait()).await.unwrap().unwrap();
    assert_eq!(result.code(), Some(0));
}

#[tokio::test]
async fn bad_settings_file_prevents_the_start() {
    let directory = std::env::temp_dir();
    let file = directory.join(format!("lastseen-bad-settings-{}", std::process::id()));
    std::fs::write(&file, "PACE=0\n").unwrap();
    let path = file.to_str().unwrap();
    let bad = run(sample(&[&format!("--lastseen-config={path}")])).await;
    std::fs::remove_file(&file).unwrap();
    let missing = run(sample(&["--lastseen-config", path])).await;
    assert_eq!((bad.code, missing.code), (Some(78), Some(78)));
    assert!(bad.errors.contains("PACE=0: expected a number from 1 to 100"), "{}", bad.errors);
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
    // It still works: it applies a changed setting.
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
    for _ in 0..80 {
        silent.push(TcpStream::connect(&service.admin).await.unwrap());
    }
    for _ in 0..3 {
        let mut command = sample(&["healthcheck"]);
        command.env("ADMIN_ADDR", &service.admin);
        let healthcheck = run(command).await;
        assert_eq!(healthcheck.code, Some(0), "{}", healthcheck.printed);
        assert!(service.get("/livez").await.starts_with("HTTP/1.0 200"));
    }
    drop(silent);
    service.stop().await;
}
