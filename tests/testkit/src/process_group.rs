//! Child processes that do not outlive the test.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// A shell script that waits until its standard input closes, which happens when the test process
/// ends in any way. Then the script kills the process group `$0` and removes the directory `$1`.
/// Without this watchdog, a test that is stopped by ctrl-c or killed by CI leaves its servers
/// running.
const WATCHDOG: &str = r#"read -r _; kill -s KILL -- "-$0"; rm -rf -- "$1""#;

/// A child process that leads its own process group, so that its children in the group can be
/// killed with it. The group is killed on drop, and when the test process ends.
#[derive(Debug)]
pub(crate) struct ProcessGroup {
    leader: Child,
    watchdog: Child,
    ended: Option<ExitStatus>,
}

impl ProcessGroup {
    /// Starts `command`. The watchdog removes `scratch` if the test process dies.
    pub(crate) fn spawn(command: &mut Command, scratch: &Path) -> Self {
        let leader = command
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let watchdog = Command::new("sh")
            .args(["-c", WATCHDOG, &leader.id().to_string()])
            .arg(scratch)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh should start");
        Self { leader, watchdog, ended: None }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.leader)
    }

    /// The leader's output pipes, which can be taken once.
    pub(crate) fn take_output(&mut self) -> (ChildStdout, ChildStderr) {
        let stdout = self.leader.stdout.take().expect("its standard output should be a pipe");
        let stderr = self.leader.stderr.take().expect("its standard error should be a pipe");
        (stdout, stderr)
    }

    /// Sends `signal` to the leader only. Does nothing if the leader has ended.
    pub(crate) fn signal(&mut self, signal: Signal) {
        // Once a wait for the leader has succeeded, another process may have its id.
        if self.try_wait().is_none() {
            kill_process(self.pid(), signal)
                .expect("a child can be signalled until it is waited for");
        }
    }

    /// The exit status of the leader, if it has ended.
    pub(crate) fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.leader.try_wait().expect("a child can be waited for");
        }
        self.ended
    }

    /// Kills the whole group and waits until its leader has ended.
    pub(crate) fn kill(&mut self) -> ExitStatus {
        let ended = self.ended.unwrap_or_else(|| {
            // Until the wait below, no other process can have the leader's id.
            if let Err(error) = kill_process_group(self.pid(), Signal::KILL) {
                eprintln!("testkit: cannot kill process group {}: {error}", self.pid());
            }
            self.leader.wait().expect("a child can be waited for")
        });
        self.ended = Some(ended);
        ended
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        self.kill();
        // The watchdog must end before its standard input closes: otherwise it would kill the
        // process group, whose id another group may have by then.
        if self.watchdog.kill().and_then(|()| self.watchdog.wait()).is_err() {
            eprintln!("testkit: a watchdog is left behind");
        }
    }
}
