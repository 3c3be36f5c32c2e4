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

/// Settings that take any free port, and rows that stay.
const QUIET: [(&str, &str); 4] = [
    ("PRODUCER_ADDR", "127.0.0.1:0"),
    ("TESTER_ADDR", "127.0.0.1:0"),
    ("VIEWER_ADDR", "127.0.0.1:0"),
    ("OBJECT_TTL", "1h"),
];

/// A directory for the files of `lastseen`, that outlives its processes.
struct Home {
    scratch: Scratch,
    settings: Vec<(&'static str, String)>,
}

impl Home {
    fn new(settings: &[(&'static str, &str)]) -> Self {
        let scratch = Scratch::new("home");
        let given = settings.iter().map(|(name, _)| *name).collect::<Vec<_>>();
        let quiet = QUIET.into_iter().filter(|(name, _)| !given.contains(name));
        let all = quiet.chain(settings.iter().copied());
        let mut settings: Vec<_> = all.map(|(name, value)| (name, value.to_owned())).collect();
        settings.push(("LASTSEEN_DIR", scratch.path().join("data").display().to_string()));
        Self { scratch, settings }
    }

    /// One whose lookups go to `status_api`; started with `--no-tester`.
    fn beside(status_api: &StatusApi) -> Self {
        Self::new(&[("TESTER_ENDPOINT", &status_api.endpoint()), ("MAX_CONSUMERS", "300")])
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.path().join("data").join(name)
    }

    fn spawn(&self, arguments: &[&str]) -> Process {
        Process::spawn("lastseen", &self.settings, arguments)
    }

    /// Starts it and waits until it is ready.
    async fn start(&self, arguments: &[&str]) -> (Process, String) {
        let process = self.spawn(arguments);
        process.ready().await;
        let endpoint = callback_endpoint(&process).await;
        (process, endpoint)
    }

    /// Runs a command to its end: its exit code and what it printed.
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

/// A status API by which the even ids are online, after `latency`.
fn even_ids_online(latency: Duration) -> StatusApi {
    StatusApi::start(move |id, _| {
        let answer = if id % 2 == 0 { Answer::Online } else { Answer::Offline };
        Answer::After(latency, Box::new(answer))
    })
}
