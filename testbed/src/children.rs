//! Finds the child processes of another process.

use std::fs;
use std::path::Path;

use rustix::process::Pid;

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
