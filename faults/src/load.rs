//! The partner's load: `tester load` as a process, and its ledger.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;

use testbed::Process;
use tester::ledger::{Answer, Entry};

/// How long a partner waits for a response.
const PARTNER_TIMEOUT_US: u64 = 1_000_000;
/// The first id of the load. Each id is used once.
const FIRST_ID: i64 = 1;

/// The rate of a load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// Callbacks per second.
    pub(crate) callbacks: u32,
    /// Ids in each.
    pub(crate) ids: u32,
}

impl Rate {
    /// 500 callbacks/s of 5 ids, or a fifth of that in a debug build, for `make test`.
    pub(crate) const USUAL: Self =
        Self { callbacks: if cfg!(debug_assertions) { 100 } else { 500 }, ids: 5 };
}

/// A load that runs until it is stopped.
pub(crate) struct Load {
    tester: Process,
    path: PathBuf,
    /// The number of bytes of the file that have been read.
    offset: u64,
    entries: Vec<Entry>,
}

impl Load {
    /// Starts the load on `endpoint` with its ledger in `path`. With `connections`, it uses at most
    /// that many.
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
        // One and a half times the connections that a second without any response needs.
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

    /// The ledger entries of the callbacks so far.
    pub(crate) fn entries(&mut self) -> &[Entry] {
        let mut text = String::new();
        if let Ok(mut file) = File::open(&self.path) {
            let read = file
                .seek(SeekFrom::Start(self.offset))
                .and_then(|_| file.read_to_string(&mut text));
            read.expect("a ledger should be readable");
        }
        // The last line may be incomplete.
        let complete = text.rfind('\n').map_or(0, |end| end + 1);
        self.offset += complete as u64;
        self.entries.extend(
            text[..complete]
                .lines()
                .map(|line| serde_json::from_str(line).expect("a line of the ledger is JSON")),
        );
        &self.entries
    }

    /// The number of callbacks that have been accepted so far.
    pub(crate) fn accepted(&mut self) -> usize {
        self.entries().iter().filter(|entry| is_2xx(entry)).count()
    }

    /// Finishes the callbacks in flight, and returns the entries of all callbacks. Callbacks that
    /// were due but not sent do not count: there are enough connections for the rate, so that only
    /// a load generator without processor time leaves any.
    pub(crate) async fn stop(mut self) -> Vec<Entry> {
        self.tester.terminate();
        let status = self.tester.wait().await;
        assert!(status.success(), "tester load: {status}");
        self.entries();
        self.entries
    }
}

/// Whether the callback was answered 2xx, even if late.
pub(crate) fn is_2xx(entry: &Entry) -> bool {
    matches!(entry.answer, Answer::Status(200..300))
}

/// Whether the response was complete within a second of the due time of the callback.
pub(crate) fn is_in_time(entry: &Entry) -> bool {
    matches!(entry.answer, Answer::Status(_)) && entry.latency_us <= PARTNER_TIMEOUT_US
}
