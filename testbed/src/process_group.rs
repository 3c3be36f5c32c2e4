//! Child processes that do not outlive the test.

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Reads from its standard input until the test process is gone, however it went; then kills the
/// process group `$0` and removes the directory `$1`. Without it, a test that is stopped by ctrl-c
/// or killed by CI leaves its servers running.
const WATCHDOG: &str = r#"read -r _; kill -s KILL -- "-$0"; rm -rf -- "$1""#;

/// A child process that leads a process group of its own, so that it can be signalled together with
/// the children that stayed in the group. It is killed on drop, and when the test process dies.
#[derive(Debug)]
pub(crate) struct ProcessGroup {
    leader: Child,
    watchdog: Child,
    ended: Option<ExitStatus>,
}

impl ProcessGroup {
    /// Starts `command`; `scratch` is what has to go when the test process dies and cannot do it.
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

    /// The ends of the leader's pipes; they can be taken once.
    pub(crate) fn take_output(&mut self) -> (ChildStdout, ChildStderr) {
        let stdout = self.leader.stdout.take().expect("its standard output should be a pipe");
        let stderr = self.leader.stderr.take().expect("its standard error should be a pipe");
        (stdout, stderr)
    }

    /// Sends `signal` to the leader only; nothing happens when it has ended.
    pub(crate) fn signal(&mut self, signal: Signal) {
        // Once it has been waited for, its id may belong to somebody else.
        if self.try_wait().is_none() {
            kill_process(self.pid(), signal)
                .expect("a child can be signalled until it is waited for");
        }
    }

    /// How the leader ended, if it has.
    pub(crate) fn try_wait(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.leader.try_wait().expect("a child can be waited for");
        }
        self.ended
    }

    /// Kills the whole group and waits until its leader is gone.
    pub(crate) fn kill(&mut self) -> ExitStatus {
        let ended = self.ended.unwrap_or_else(|| {
            // Until the wait below, the id cannot belong to anybody else.
            if let Err(error) = kill_process_group(self.pid(), Signal::KILL) {
                eprintln!("testbed: cannot kill process group {}: {error}", self.pid());
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
        // Its work is done; it has to go before it sees its standard input close.
        if self.watchdog.kill().and_then(|()| self.watchdog.wait()).is_err() {
            eprintln!("testbed: a watchdog is left behind");
        }
    }
}
