//! The states of processes and threads, and the children of a process.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Pid;

const END_DEADLINE: Duration = Duration::from_secs(10);

/// Waits until `parent` is stopped and cannot start more processes, and returns its children.
pub(crate) fn children_once_stopped(parent: Pid) -> Vec<Pid> {
    let parent = parent.as_raw_nonzero().get();
    // The stop signal takes effect at once on a sleeping process and soon on a running one. A
    // zombie cannot start processes either.
    while stat(Path::new(&format!("/proc/{parent}")))
        .is_some_and(|stat| !matches!(stat.state, 'T' | 'Z'))
    {
        std::thread::yield_now();
    }
    fs::read_dir("/proc")
        .expect("/proc should be there")
        .flatten()
        .filter(|entry| stat(&entry.path()).is_some_and(|stat| stat.parent == parent))
        .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

/// Waits until killed processes have ended and released their resources, as a zombie has; at most
/// for [`END_DEADLINE`], because a process that waits for a disk ends only after that wait.
pub(crate) fn wait_until_ended(processes: &[Pid]) {
    let deadline = Instant::now() + END_DEADLINE;
    for process in processes {
        let folder = format!("/proc/{}", process.as_raw_nonzero());
        let is_running = || stat(Path::new(&folder)).is_some_and(|stat| stat.state != 'Z');
        while is_running() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

/// A process or thread in `/proc`.
pub(crate) struct Stat {
    pub(crate) state: char,
    parent: i32,
}

/// Reads the state of the process or thread with this folder in `/proc`.
pub(crate) fn stat(folder: &Path) -> Option<Stat> {
    let line = fs::read_to_string(folder.join("stat")).ok()?;
    // The second field is the program's name in parentheses, which can hold anything.
    let mut fields = line.rsplit_once(") ")?.1.split(' ');
    Some(Stat { state: fields.next()?.chars().next()?, parent: fields.next()?.parse().ok()? })
}
