//! All roles in one process, on files. One binary, because each takes seconds to link.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod commands;
mod crash;
mod disk_full;
mod files;
mod pipeline;

use std::path::PathBuf;
use std::time::Duration;

use ::pipeline::callback_endpoint;
use testbed::{Answer, Process, Scratch, StatusApi};

const MILLISECOND: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_mins(1);

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
        let given = settings.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        let defaults = DEFAULTS.into_iter().filter(|(name, _)| !given.contains(name));
        let all = defaults.chain(settings.iter().copied());
        let mut settings: Vec<_> = all.map(|(name, value)| (name, value.to_owned())).collect();
        settings.push(("LASTSEEN_DIR", scratch.path().join("data").display().to_string()));
        Self { scratch, settings }
    }

    /// A home whose lookups go to `status_api`. It must be started with `--no-tester`.
    fn with_status_api(status_api: &StatusApi) -> Self {
        Self::new(&[("TESTER_ENDPOINT", &status_api.endpoint()), ("MAX_CONSUMERS", "300")])
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.path().join("data").join(name)
    }

    fn spawn(&self, arguments: &[&str]) -> Process {
        Process::spawn("lastseen", &self.settings, arguments)
    }

    /// Starts `lastseen` and waits until it is ready. Returns also the URL for callbacks.
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

/// A status API for which even ids are online. It responds after `latency`.
fn even_ids_online(latency: Duration) -> StatusApi {
    StatusApi::start(move |id, _| {
        let answer = if id % 2 == 0 { Answer::Online } else { Answer::Offline };
        Answer::After(latency, Box::new(answer))
    })
}
