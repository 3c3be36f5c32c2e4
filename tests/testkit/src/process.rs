//! Runs a service of this workspace as a process.

use std::ffi::OsStr;
use std::fs::{self, DirEntry};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

use parking_lot::Mutex;
use rustix::process::{Resource, Rlimit, Signal, getrlimit, prlimit};

use crate::children::stat;
use crate::process_group::ProcessGroup;
use crate::process_log::ProcessLog;
use crate::scratch::Scratch;
use crate::{http_get, programs, wait_for, wait_until};

/// A running service. It is killed on drop. When the test fails, the end of its log is printed.
#[derive(Debug)]
pub struct Process {
    binary: String,
    group: Mutex<ProcessGroup>,
    log: ProcessLog,
    /// The working directory.
    _scratch: Scratch,
}

impl Process {
    /// Starts `binary` in an empty directory, so that it reads no `.env`. Its environment is
    /// `PATH`, an `ADMIN_ADDR` with a free port, a `DRAIN_DELAY` of zero, and `environment`, which
    /// takes precedence.
    ///
    /// # Panics
    /// When the binary has not been built: cargo builds only the binaries of the tested package.
    pub fn spawn(binary: &str, environment: &[(&str, String)], arguments: &[&str]) -> Self {
        Self::spawn_wrapped(&[], binary, environment, arguments)
    }

    /// Like [`Process::spawn`], but starts `binary` through `wrapper`: a command that finally
    /// replaces itself with the command in its arguments, such as `nice`.
    pub fn spawn_wrapped(
        wrapper: &[&str],
        binary: &str,
        environment: &[(&str, String)],
        arguments: &[&str],
    ) -> Self {
        let folder = target_folder();
        let path = folder.join(binary);
        assert!(path.is_file(), "{} is missing: run `cargo build --workspace`", path.display());
        let mut words = wrapper.iter().map(OsStr::new).chain([path.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command
            .args(words)
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("ADMIN_ADDR", "127.0.0.1:0")
            // No load balancer must detect that the process stops.
            .env("DRAIN_DELAY", "0s")
            .envs(environment.iter().map(|(name, value)| (name, value)));
        Self::spawn_command(binary, &mut command)
    }

    /// Starts `command`, which `name` describes, in an empty directory.
    ///
    /// # Panics
    /// When the program is missing.
    pub fn spawn_command(name: &str, command: &mut Command) -> Self {
        let scratch = Scratch::new(name);
        command.current_dir(scratch.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut group = ProcessGroup::spawn(command, scratch.path());
        let folder = target_folder();
        let logs = folder.parent().unwrap_or(&folder).join("test-logs");
        let mut log = ProcessLog::new(&logs, name);
        let (stdout, stderr) = group.take_output();
        log.collect(stdout);
        log.collect(stderr);
        Self { binary: name.to_owned(), group: Mutex::new(group), log, _scratch: scratch }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.group.lock().pid().as_raw_nonzero().get().unsigned_abs()
    }

    /// Whether the process has not ended.
    pub fn is_running(&self) -> bool {
        self.group.lock().try_wait().is_none()
    }

    /// All lines that the process has printed so far to both outputs.
    pub fn log(&self) -> Vec<String> {
        self.log.lines()
    }

    /// Waits for a line that contains `substring`, and returns the first one.
    pub async fn wait_for_log(&self, substring: &str) -> String {
        let what = format!("{} logs {substring:?}", self.binary);
        wait_for(&what, async || {
            // Read before the lines: otherwise a last line that arrives in between would be missed.
            let is_complete = self.log.is_complete();
            let line = self.log.find(substring);
            assert!(
                !is_complete || line.is_some(),
                "{} ended without logging {substring:?}",
                self.binary
            );
            line
        })
        .await
    }

    /// Waits until the process has logged its admin address, and returns it.
    pub async fn admin(&self) -> SocketAddr {
        address_in(&self.wait_for_log("admin=").await, "admin=")
    }

    /// Waits for a line that contains `substring`, and returns its field `address`.
    pub(crate) async fn logged_address(&self, substring: &str) -> SocketAddr {
        address_in(&self.wait_for_log(substring).await, "address=")
    }

    /// Gets `path` from the admin address. Returns the status and the body.
    pub async fn get(&self, path: &str) -> (u16, String) {
        let reply = http_get(self.admin().await, path).await;
        let reply = reply.unwrap_or_else(|error| panic!("{} at {path}: {error}", self.binary));
        (reply.status, reply.body)
    }

    /// Waits until the process is ready.
    pub async fn ready(&self) {
        let what = format!("{} is ready", self.binary);
        wait_until(&what, async || {
            assert!(self.is_running(), "{} ended before it was ready", self.binary);
            self.get("/readyz").await.0 == 200
        })
        .await;
    }

    /// Waits until the process is not ready, and names all of `reasons`.
    pub async fn wait_until_unready(&self, reasons: &[&str]) {
        let what = format!("{} is not ready because of {reasons:?}", self.binary);
        wait_until(&what, async || {
            let (status, body) = self.get("/readyz").await;
            status == 503 && reasons.iter().all(|reason| body.contains(reason))
        })
        .await;
    }

    /// Waits until a metric, as in [`Process::metric`], is at least `minimum`.
    pub async fn wait_for_metric(&self, name_prefix: &str, minimum: f64) {
        let what = format!("{}: {name_prefix} is at least {minimum}", self.binary);
        wait_until(&what, async || self.metric(name_prefix).await >= minimum).await;
    }

    /// The sum of all samples in /metrics whose line starts with `name_prefix`, which can include
    /// labels. It is 0 without a sample, like a counter before its first increment.
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

    /// The resident memory in KiB.
    pub fn rss_kib(&self) -> u64 {
        self.memory_kib("VmRSS:")
    }

    /// The peak of the resident memory in KiB.
    pub fn peak_rss_kib(&self) -> u64 {
        self.memory_kib("VmHWM:")
    }

    fn memory_kib(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.expect("a running process has a status");
        let value = status.lines().find_map(|line| line.strip_prefix(field));
        value
            .and_then(|value| value.trim().strip_suffix(" kB"))
            .and_then(|value| value.parse().ok())
            .expect("a running process has a resident set")
    }

    /// Sets the soft limit of open files and connections, and returns the previous limit. Files and
    /// connections that are already open stay open.
    pub fn limit_open_files(&self, limit: u64) -> u64 {
        // The inherited hard limit stays, because only root could raise it again.
        let limit = Rlimit { current: Some(limit), maximum: getrlimit(Resource::Nofile).maximum };
        let before = prlimit(Some(self.group.lock().pid()), Resource::Nofile, limit);
        before.expect("a child can be limited").current.unwrap_or(u64::MAX)
    }

    /// Sends SIGTERM, so that the process drains and ends.
    pub fn terminate(&self) {
        self.group.lock().signal(Signal::TERM);
    }

    /// Drains the process by SIGTERM.
    pub async fn stop(&self) {
        self.terminate();
        let ended = self.wait().await;
        assert!(ended.success(), "{} should drain: {ended}", self.binary);
    }

    /// Pauses the process, as a debugger or a frozen virtual machine would, and returns when none
    /// of its threads runs.
    pub async fn pause(&self) {
        self.group.lock().signal(Signal::STOP);
        // One thread handles the signal when it is scheduled, and stops the others.
        wait_for("all threads are stopped", async || {
            let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).ok()?;
            let is_stopped =
                |task: DirEntry| stat(&task.path()).is_some_and(|stat| stat.state == 'T');
            tasks.flatten().all(is_stopped).then_some(())
        })
        .await;
    }

    /// Resumes the paused process.
    pub fn resume(&self) {
        self.group.lock().signal(Signal::CONT);
    }

    /// Kills the process, and returns when it has ended.
    pub fn kill(&self) {
        self.group.lock().kill();
    }

    /// Waits until the process has ended and its log is complete, and returns its exit status.
    pub async fn wait(&self) -> ExitStatus {
        let what = format!("{} ends", self.binary);
        wait_for(&what, async || self.group.lock().try_wait().filter(|_| self.log.is_complete()))
            .await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            programs::print_tail(&self.binary, &self.log());
        }
    }
}

fn address_in(line: &str, field: &str) -> SocketAddr {
    let value = line.split(field).nth(1).and_then(|rest| rest.split_whitespace().next());
    let address = value.and_then(|address| address.parse().ok());
    address.unwrap_or_else(|| panic!("no address in {line:?}"))
}

/// `target/<profile>`. Test executables are in its folder `deps`.
fn target_folder() -> PathBuf {
    let executable = std::env::current_exe().expect("a process knows its executable");
    let mut folder = executable.parent().expect("a file is in a folder");
    if folder.ends_with("deps") {
        folder = folder.parent().expect("deps is in a folder");
    }
    folder.to_owned()
}
