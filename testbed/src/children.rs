//! The child processes of a process that is not ours to wait for them.

use std::fs;
use std::path::Path;

use rustix::process::Pid;

/// The processes that `parent` has started, once it is stopped and can start no more.
pub(crate) fn children_once_stopped(parent: Pid) -> Vec<Pid> {
    let parent = parent.as_raw_nonzero().get();
    // It takes effect at once on a process that sleeps, and soon on one that runs. A zombie is as
    // good as stopped.
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

struct Stat {
    state: char,
    parent: i32,
}

fn stat(folder: &Path) -> Option<Stat> {
    let line = fs::read_to_string(folder.join("stat")).ok()?;
    // The second field is the program's name in parentheses, which can hold anything.
    let mut fields = line.rsplit_once(") ")?.1.split(' ');
    Some(Stat { state: fields.next()?.chars().next()?, parent: fields.next()?.parse().ok()? })
}
