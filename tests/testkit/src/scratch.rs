//! Temporary directories that are removed on drop.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use uuid::Uuid;

use crate::process_group::ProcessGroup;
use crate::programs;

/// The name of a server's log file.
const LOG: &str = "server.log";

/// A new directory. On drop, the directory and its content are removed. If the test fails, the end
/// of the server's log in the directory is printed.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Creates a directory whose name contains `purpose`.
    pub fn new(purpose: &str) -> Self {
        let name = format!("lastseen-{purpose}-{}", Uuid::now_v7().simple());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("the temporary directory should be writable");
        Self(path)
    }

    /// Makes a server print to a log in this directory.
    pub(crate) fn log_to(&self, command: &mut Command) {
        let log = File::options().create(true).append(true).open(self.0.join(LOG));
        let log = log.expect("a scratch file should be writable");
        command.stdout(log.try_clone().expect("a file handle can be duplicated")).stderr(log);
    }

    /// Starts a program in this directory, and writes its output to the log in this directory.
    pub(crate) fn spawn(&self, program: &str, arguments: &[&str]) -> ProcessGroup {
        let mut command = Command::new(programs::find(program, &[]));
        command.args(arguments).current_dir(&self.0);
        self.log_to(&mut command);
        ProcessGroup::spawn(&mut command, &self.0)
    }

    /// Writes a file into this directory.
    pub(crate) fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).expect("a scratch file should be writable");
        path
    }

    /// The path of the directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Ok(content) = std::fs::read(self.0.join(LOG))
        {
            let lines: Vec<_> =
                String::from_utf8_lossy(&content).lines().map(str::to_owned).collect();
            programs::print_tail(&self.0.display().to_string(), &lines);
        }
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("testkit: {} is left behind: {error}", self.0.display());
        }
    }
}
