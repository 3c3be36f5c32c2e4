//! The partner's load: `tester load` as a process, and its ledger.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;

use testbed::Process;
use tester::ledger::{Answer, Entry};

/// How long a partner waits for an answer.
const PARTNER_TIMEOUT_US: u64 = 1_000_000;
/// The first id of the load; each next one is new.
const FIRST_ID: i64 = 1;

/// How many callbacks there are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// Callbacks per second.
    pub(crate) callbacks: u32,
    /// Ids in each.
    pub(crate) ids: u32,
}

impl Rate {
    /// 500 callbacks/s of 5 ids; a fifth of it in a debug build, which is for `make test`.
    pub(crate) const USUAL: Self =
        Self { callbacks: if cfg!(debug_assertions) { 100 } else { 500 }, ids: 5 };
}

/// A load that runs until it is stopped.
pub(crate) struct Load {
    tester: Process,
    path: PathBuf,
    /// How much of the file has been read.
    offset: u64,
    entries: Vec<Entry>,
}

impl Load {
    /// Starts it against `endpoint`, with its ledger in `path`; over so many connections at most if it
    /// is told how many.
    pub(crate) fn start(
        endpoint: &str,
        rate: Rate,
        connections: Option<u32>,
        path: PathBuf,
    ) -> Self {
        let ledger = format!("--ledger={}", path.display());
        let callbacks = format!("--rate={}", rate.callbacks);
        let ids = format!("--ids={}", rate.ids);
        let first = format!("--object-id-min={FIRST_ID}");
        let last = format!("--object-id-max={FIRST_ID}");
        // Enough for a second without any answer, and half as much again.
        let enough = (rate.callbacks * 3 / 2).clamp(16, 2_000);
        let connections = format!("--connections={}", connections.unwrap_or(enough));
        let endpoint = format!("--callback-endpoint={endpoint}");
        let tester = Process::spawn(
            "tester",
            &[],
            &[
                "load",
                "--duration=1h",
                "--unique",
                "--json",
                &endpoint,
                &callbacks,
                &ids,
                &first,
                &last,
                &connections,
                &ledger,
            ],
        );
        Self { tester, path, offset: 0, entries: Vec::new() }
    }

    /// What has come of the callbacks so far.
    pub(crate) fn entries(&mut self) -> &[Entry] {
        let mut text = String::new();
        if let Ok(mut file) = File::open(&self.path) {
            let read = file
                .seek(SeekFrom::Start(self.offset))
                .and_then(|_| file.read_to_string(&mut text));
            read.expect("a ledger should be readable");
        }
        // The last line may not be whole yet.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        self.offset += whole as u64;
        self.entries.extend(
            text[..whole]
                .lines()
                .map(|line| serde_json::from_str(line).expect("a line of the ledger is JSON")),
        );
        &self.entries
    }

    /// How many callbacks have been accepted so far.
    pub(crate) fn accepted(&mut self) -> usize {
        self.entries().iter().filter(|entry| is_2xx(entry)).count()
    }

    /// Lets it finish what is under way, and gives what came of all callbacks. What was due and not
    /// sent at this moment is nobody's: there are connections enough for the rate, and only a load
    /// generator which lacks the time leaves anything behind.
    pub(crate) async fn stop(mut self) -> Vec<Entry> {
        self.tester.terminate();
        let status = self.tester.wait().await;
        assert!(status.success(), "tester load: {status}");
        self.entries();
        self.entries
    }
}

/// Whether it was answered 2xx, however late.
pub(crate) fn is_2xx(entry: &Entry) -> bool {
    matches!(entry.answer, Answer::Status(200..300))
}

/// Whether an answer was complete within a second of when the callback was due.
pub(crate) fn is_in_time(entry: &Entry) -> bool {
    matches!(entry.answer, Answer::Status(_)) && entry.latency_us <= PARTNER_TIMEOUT_US
}
