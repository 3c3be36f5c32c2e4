//! A service of this workspace as a process of its own.

use std::ffi::OsStr;
use std::fs::{self, DirEntry};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, Signal, getrlimit, prlimit};

use crate::process_group::ProcessGroup;
use crate::process_log::ProcessLog;
use crate::scratch::Scratch;
use crate::{eventually, http_get, programs};

/// How long a test waits for a process to say or do something. It is far more than any of them
/// needs, because a machine that runs all tests at once is slow.
const PATIENCE: Duration = Duration::from_mins(1);

/// A running service, killed on drop. When the test fails, the end of its log is shown.
#[derive(Debug)]
pub struct Process {
    binary: String,
    group: Mutex<ProcessGroup>,
    log: ProcessLog,
    /// Its working directory.
    _scratch: Scratch,
}

impl Process {
    /// Starts `binary` with exactly that environment, `PATH`, an `ADMIN_ADDR` with a free port and a
    /// `DRAIN_DELAY` of zero unless others are given; in an empty directory, so that it reads no `.env`.
    ///
    /// # Panics
    /// When the binary has not been built: cargo builds those of the tested package only.
    #[must_use]
    pub fn spawn(binary: &str, environment: &[(&str, String)], arguments: &[&str]) -> Self {
        Self::spawn_wrapped(&[], binary, environment, arguments)
    }

    /// Like [`Process::spawn`], by a command that ends in executing the one that follows it, such as
    /// `nice`: the process is that one's then.
    ///
    /// # Panics
    /// As [`Process::spawn`].
    #[must_use]
    pub fn spawn_wrapped(
        wrapper: &[&str],
        binary: &str,
        environment: &[(&str, String)],
        arguments: &[&str],
    ) -> Self {
        let folder = target_folder();
        let path = folder.join(binary);
        assert!(path.is_file(), "{} is missing: run `cargo build --workspace`", path.display());
        let scratch = Scratch::new(binary);
        let mut words = wrapper.iter().map(OsStr::new).chain([path.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command
            .args(words)
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("ADMIN_ADDR", "127.0.0.1:0")
            // No balancer has to notice that it stops.
            .env("DRAIN_DELAY", "0s")
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .current_dir(scratch.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut group = ProcessGroup::spawn(&mut command, scratch.path());
        let logs = folder.parent().unwrap_or(&folder).join("test-logs");
        let mut log = ProcessLog::new(&logs, binary);
        let (stdout, stderr) = group.take_output();
        log.collect(stdout);
        log.collect(stderr);
        Self { binary: binary.to_owned(), group: Mutex::new(group), log, _scratch: scratch }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.group().pid().as_raw_nonzero().get().unsigned_abs()
    }

    /// Whether it has not ended.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.group().try_wait().is_none()
    }

    /// All lines that it has printed so far, to either output.
    #[must_use]
    pub fn log(&self) -> Vec<String> {
        self.log.lines()
    }

    /// The first line with `substring` in it, now or as soon as it is printed.
    ///
    /// # Panics
    /// When the process ends without having printed it, or does not print it within a minute.
    pub async fn wait_for_log(&self, substring: &str) -> String {
        let what = format!("{} logs {substring:?}", self.binary);
        eventually(&what, PATIENCE, async || {
            // Looked at first: a line that is printed in between is then seen below.
            let complete = self.log.is_complete();
            let line = self.log.find(substring);
            assert!(!complete || line.is_some(), "{} ended without {substring:?}", self.binary);
            line
        })
        .await
    }

    /// Its admin address, once it has told it.
    pub async fn admin(&self) -> SocketAddr {
        let line = self.wait_for_log("admin=").await;
        let value = line.split("admin=").nth(1).and_then(|rest| rest.split_whitespace().next());
        value
            .and_then(|address| address.parse().ok())
            .unwrap_or_else(|| panic!("no admin address in {line:?}"))
    }

    /// Status and body of `path` on the admin address.
    ///
    /// # Panics
    /// When there is no answer.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let reply = http_get(self.admin().await, path).await;
        let reply = reply.unwrap_or_else(|error| panic!("{} at {path}: {error}", self.binary));
        (reply.status, reply.body)
    }

    /// Waits until it is ready.
    ///
    /// # Panics
    /// When it ends, or is not ready within a minute.
    pub async fn ready(&self) {
        let what = format!("{} is ready", self.binary);
        eventually(&what, PATIENCE, async || {
            assert!(self.is_running(), "{} has ended and will not get ready", self.binary);
            (self.get("/readyz").await.0 == 200).then_some(())
        })
        .await;
    }

    /// The sum of all samples in /metrics whose line starts with `name_prefix`, which can include
    /// labels; 0 when there is none, which is what a counter is before it first counts.
    pub async fn metric(&self, name_prefix: &str) -> f64 {
        let (status, body) = self.get("/metrics").await;
        assert_eq!(status, 200, "{body}");
        body.lines()
            .filter(|line| line.starts_with(name_prefix))
            .map(|line| {
                let value = line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok());
                value.unwrap_or_else(|| panic!("no number at the end of {line:?}"))
            })
            .sum()
    }

    /// How much memory it occupies, in KiB.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn rss_kib(&self) -> u64 {
        self.memory_kib("VmRSS:")
    }

    /// The most memory that it has occupied so far, in KiB.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn peak_rss_kib(&self) -> u64 {
        self.memory_kib("VmHWM:")
    }

    fn memory_kib(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("a process that runs has a status");
        let value = status.lines().find_map(|line| line.strip_prefix(field));
        value
            .and_then(|value| value.trim().strip_suffix(" kB"))
            .and_then(|value| value.parse().ok())
            .expect("a process that runs has a resident set")
    }

    /// Lets it have no more than so many files and connections open, and gives how many it could have
    /// before. What is open stays open, however many those are.
    ///
    /// # Panics
    /// When it has ended.
    #[must_use]
    pub fn limit_open_files(&self, most: u64) -> u64 {
        // The hard limit, which it has inherited, stays: only root could raise it again.
        let limit = Rlimit { current: Some(most), maximum: getrlimit(Resource::Nofile).maximum };
        let before = prlimit(Some(self.group().pid()), Resource::Nofile, limit);
        before.expect("a child can be limited").current.unwrap_or(u64::MAX)
    }

    /// Asks it to drain and end, by SIGTERM.
    pub fn terminate(&self) {
        self.group().signal(Signal::TERM);
    }

    /// Takes the processor away from it, as a debugger or a frozen virtual machine would, and returns when
    /// none of its threads runs any more.
    ///
    /// # Panics
    /// When it does not stop within a minute.
    pub async fn pause(&self) {
        self.group().signal(Signal::STOP);
        // The signal has one thread stop the others, once it comes to run.
        eventually("all threads are stopped", PATIENCE, async || {
            let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).ok()?;
            let is_stopped = |task: io::Result<DirEntry>| {
                let stat = fs::read_to_string(task?.path().join("stat"))?;
                // The name is in brackets, and may have any character; the state follows it.
                Ok::<_, io::Error>(
                    stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T")),
                )
            };
            tasks.map(is_stopped).all(|stopped| stopped.unwrap_or(false)).then_some(())
        })
        .await;
    }

    /// Lets it go on where it was paused.
    pub fn resume(&self) {
        self.group().signal(Signal::CONT);
    }

    /// Kills it, and returns when it is gone.
    pub fn kill(&self) {
        self.group().kill();
    }

    /// How it ended, once it has and its log is complete.
    ///
    /// # Panics
    /// When it does not end within a minute.
    pub async fn wait(&self) -> ExitStatus {
        let what = format!("{} ends", self.binary);
        eventually(&what, PATIENCE, async || {
            self.group().try_wait().filter(|_| self.log.is_complete())
        })
        .await
    }

    fn group(&self) -> MutexGuard<'_, ProcessGroup> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            programs::print_tail(&self.binary, &self.log());
        }
    }
}

/// `target/<profile>`: test executables are in `deps` below it.
fn target_folder() -> PathBuf {
    let executable = std::env::current_exe().expect("a process knows its executable");
    let mut folder = executable.parent().expect("a file is in a folder");
    if folder.ends_with("deps") {
        folder = folder.parent().expect("deps is in a folder");
    }
    folder.to_owned()
}
