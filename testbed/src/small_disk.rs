//! A small disk that a test can fill.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::process::Process;

/// A wrapper for [`Process::spawn_wrapped`] that mounts a disk of 48 MiB at the process's
/// `SPOOL_DIR`, or without one at its `LASTSEEN_DIR`. Only the process sees the disk, which
/// disappears with it. Mounting needs root, at least in a user namespace.
pub const WITH_SMALL_DISK: [&str; 7] = [
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    r#"mount -t tmpfs -o size=48m small "${SPOOL_DIR:-$LASTSEEN_DIR}" && exec "$0" "$@""#,
];

/// Fills the small disk of `process` at `directory`. Returns a file whose removal frees the space.
///
/// # Panics
/// When 64 MiB fit on the disk.
#[must_use]
pub fn fill_disk(process: &Process, directory: &Path) -> PathBuf {
    // Other processes reach the disk through the root directory of `process`.
    let root = PathBuf::from(format!("/proc/{}/root", process.pid()));
    let filler = root.join(directory.strip_prefix("/").unwrap_or(directory)).join("filler");
    let written = fs::write(&filler, vec![0; 64 << 20]);
    assert_eq!(written.map_err(|error| error.kind()), Err(ErrorKind::StorageFull));
    filler
}
