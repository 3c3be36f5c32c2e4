//! Tests all roles in one process, on files. All tests are in one binary, because each binary takes
//! seconds to link.

#![expect(clippy::unwrap_used, reason = "test helpers may panic, too")]

mod commands;
mod crash;
mod disk_full;
mod files;
mod groups;
mod history;
mod pipeline;
mod roles;

use std::path::PathBuf;
use std::time::Duration;

use testkit::{PATIENCE, Process, Scratch, StatusApi, callback_endpoint};

const MILLISECOND: Duration = Duration::from_millis(1);

/// Free ports, and a TTL that keeps all rows.
const DEFAULTS: [(&str, &str); 4] = [
    ("PRODUCER_ADDR", "127.0.0.1:0"),
    ("TESTER_ADDR", "127.0.0.1:0"),
    ("VIEWER_ADDR", "127.0.0.1:0"),
    ("OBJECT_TTL", "1h"),
];

/// A directory for the files of `lastseen`, which outlives its processes.
struct Home {
    scratch: Scratch,
    settings: Vec<(&'static str, String)>,
}

impl Home {
    fn new(settings: &[(&'static str, &str)]) -> Self {
        let scratch = Scratch::new("home");
        // The last value of a variable counts.
        let all = DEFAULTS.into_iter().chain(settings.iter().copied());
        let mut settings: Vec<_> = all.map(|(name, value)| (name, value.to_owned())).collect();
        settings.push(("LASTSEEN_DIR", scratch.path().join("data").display().to_string()));
        Self { scratch, settings }
    }

    /// A home whose lookups go to `status_api`. It must be started with `--no-tester`.
    fn with_status_api(status_api: &StatusApi) -> Self {
        Self::new(&[("TESTER_ENDPOINT", &status_api.endpoint()), ("MAX_CONSUMERS", "300")])
    }

    fn with_even_ids_online(latency: Duration) -> (StatusApi, Self) {
        let api = StatusApi::even_ids_online(latency);
        let home = Self::with_status_api(&api);
        (api, home)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.path().join("data").join(name)
    }

    fn spawn(&self, arguments: &[&str]) -> Process {
        Process::spawn("lastseen", &self.settings, arguments)
    }

    /// Starts `lastseen`, and waits until it is ready. Also returns the URL for callbacks.
    async fn start(&self, arguments: &[&str]) -> (Process, String) {
        let process = self.spawn(arguments);
        process.ready().await;
        let endpoint = callback_endpoint(&process).await;
        (process, endpoint)
    }

    /// Runs a command to its end. Returns its exit code and its output.
    async fn run(&self, arguments: &[&str]) -> (Option<i32>, Vec<String>) {
        let process = self.spawn(arguments);
        let status = process.wait().await;
        (status.code(), process.log())
    }

    /// Asserts that a command ends with this exit code and prints `error`.
    async fn assert_fails(&self, arguments: &[&str], code: i32, error: &str) {
        let (actual, lines) = self.run(arguments).await;
        assert_eq!(actual, Some(code), "{arguments:?}: {lines:?}");
        assert!(lines.concat().contains(error), "{arguments:?}: {lines:?}");
    }

    /// The ids that `lastseen objects` lists.
    async fn online(&self) -> Vec<i64> {
        let (code, lines) = self.run(&["objects", "--json"]).await;
        assert_eq!(code, Some(0), "{lines:?}");
        let objects = lines.iter().filter_map(|line| serde_json::from_str(line).ok());
        objects
            .map(|object: serde_json::Value| object["id"].as_str().unwrap().parse().unwrap())
            .collect()
    }
}
