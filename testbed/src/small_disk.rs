//! A disk that is soon full.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::process::Process;

/// For [`Process::spawn_wrapped`]: mounts a disk of 48 MiB at the process's `SPOOL_DIR`, or if it has
/// none at its `LASTSEEN_DIR`, for itself alone, and becomes the process that follows. Only root may do
/// so, and whoever is root in a name space of its own. The disk goes with the process.
pub const WITH_SMALL_DISK: [&str; 7] = [
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    r#"mount -t tmpfs -o size=48m small "${SPOOL_DIR:-$LASTSEEN_DIR}" && exec "$0" "$@""#,
];

/// Fills the small disk that `process` has at `directory`. Removing the file that it gives makes room
/// again.
///
/// # Panics
/// When there is room for 64 MiB.
#[must_use]
pub fn fill_disk(process: &Process, directory: &Path) -> PathBuf {
    // Seen from outside, its disk is below its own root.
    let root = PathBuf::from(format!("/proc/{}/root", process.pid()));
    let filling = root.join(directory.strip_prefix("/").unwrap_or(directory)).join("filling");
    let written = fs::write(&filling, vec![0; 64 << 20]);
    assert_eq!(written.map_err(|error| error.kind()), Err(ErrorKind::StorageFull));
    filling
}
