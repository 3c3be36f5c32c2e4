//! The partner's load: `tester load` as a process, and its ledger.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;

use tester::ledger::{Answer, Entry};
use testkit::Process;

/// How long a partner waits for a response.
const PARTNER_TIMEOUT_US: u64 = 1_000_000;
/// The first id of the load. Each id is used once.
const FIRST_ID: i64 = 1;

/// The rate of a load.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// Callbacks per second.
    pub(crate) callbacks: u32,
    pub(crate) ids: u32,
}

impl Rate {
    /// 500 callbacks/s of 5 ids, or a fifth of that in a debug build, for `make test`.
    pub(crate) const USUAL: Self =
        Self { callbacks: if cfg!(debug_assertions) { 100 } else { 500 }, ids: 5 };
}

impl Default for Rate {
    fn default() -> Self {
        Self::USUAL
    }
}

pub(crate) struct Load {
    tester: Process,
    path: PathBuf,
    /// The number of bytes of the file that have been read.
    offset: u64,
    entries: Vec<Entry>,
}

impl Load {
    /// Starts the load on `endpoint` with its ledger in `path`. If `connections` is set, it limits
    /// the number of connections.
    pub(crate) fn start(
        endpoint: &str,
        rate: Rate,
        connections: Option<u32>,
        path: PathBuf,
    ) -> Self {
        // One and a half times the connections that a second without any response needs.
        let enough = (rate.callbacks * 3 / 2).clamp(16, 2_000);
        let flags = [
            "load --duration=1h --unique --json".to_owned(),
            format!("--rate={} --ids={}", rate.callbacks, rate.ids),
            format!("--object-id-min={FIRST_ID} --object-id-max={FIRST_ID}"),
            format!("--connections={}", connections.unwrap_or(enough)),
            format!("--callback-endpoint={endpoint}"),
        ]
        .join(" ");
        let ledger = format!("--ledger={}", path.display());
        let flags: Vec<&str> = flags.split(' ').chain([ledger.as_str()]).collect();
        let tester = Process::spawn("tester", &[], &flags);
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
    /// were due but not sent have no entry: there are enough connections for the rate, so that only
    /// a load generator without processor time leaves callbacks unsent.
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
