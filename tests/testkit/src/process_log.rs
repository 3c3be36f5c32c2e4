//! Collects the output of a process while it runs.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;

/// The output lines of a process. They are also written to a file, which stays for the analysis of
/// failures.
#[derive(Debug)]
pub(crate) struct ProcessLog {
    lines: Arc<Mutex<Lines>>,
    readers: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Lines {
    in_memory: Vec<String>,
    file: File,
}

impl ProcessLog {
    /// Creates a log with the file `<folder>/<binary>-<test process>-<number>.log`. The name
    /// contains the test process, because several test processes share the folder.
    pub(crate) fn new(folder: &Path, binary: &str) -> Self {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let number = STARTED.fetch_add(1, Ordering::Relaxed) + 1;
        let path = folder.join(format!("{binary}-{}-{number}.log", std::process::id()));
        fs::create_dir_all(folder).expect("the target directory should be writable");
        let file = File::create(path).expect("the target directory should be writable");
        Self {
            lines: Arc::new(Mutex::new(Lines { in_memory: Vec::new(), file })),
            readers: Vec::new(),
        }
    }

    /// Collects the lines of `pipe` on a thread, so that the process never waits for a busy test.
    pub(crate) fn collect(&mut self, pipe: impl Read + Send + 'static) {
        let lines = Arc::clone(&self.lines);
        self.readers.push(std::thread::spawn(move || {
            for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).into_owned();
                let mut lines = lines.lock();
                if let Err(error) = writeln!(lines.file, "{line}") {
                    eprintln!("testkit: a log line is not copied: {error}");
                }
                lines.in_memory.push(line);
            }
        }));
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.lock().in_memory.clone()
    }

    pub(crate) fn find(&self, substring: &str) -> Option<String> {
        let lines = self.lines.lock();
        lines.in_memory.iter().find(|line| line.contains(substring)).cloned()
    }

    /// Whether the process has closed its pipes and every line is collected.
    pub(crate) fn is_complete(&self) -> bool {
        self.readers.iter().all(JoinHandle::is_finished)
    }
}
