//! File systems on which a test runs a process.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::process::Process;

/// A wrapper for [`Process::spawn_wrapped`] that makes all file systems read-only for the process,
/// including the directories for temporary files, like Kubernetes' `readOnlyRootFilesystem`. Only
/// the `SPOOL_DIR` and the `LASTSEEN_DIR` of the process stay writable.
pub const WITH_READ_ONLY_ROOT: [&str; 7] = with_own_mounts(
    r#"
    for directory in /tmp /var/tmp /usr/tmp; do
        [ -d "$directory" ] || continue
        mount --bind "$directory" "$directory"
        mount -o remount,bind,ro "$directory"
    done
    for directory in $SPOOL_DIR $LASTSEEN_DIR; do
        mount --bind "$directory" "$directory"
        mount -o remount,bind,rw "$directory"
    done
    mount -o remount,bind,ro /
    exec "$0" "$@""#,
);

/// A wrapper for [`Process::spawn_wrapped`] that mounts a disk of 48 MiB at the process's
/// `SPOOL_DIR` or, if that is not set, at its `LASTSEEN_DIR`. Only the process sees the disk, which
/// disappears with the process. Mounting needs root, at least in a user namespace.
pub const WITH_SMALL_DISK: [&str; 7] = with_own_mounts(
    r#"mount -t tmpfs -o size=48m small "${SPOOL_DIR:-$LASTSEEN_DIR}" && exec "$0" "$@""#,
);

const fn with_own_mounts(script: &'static str) -> [&'static str; 7] {
    ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec", script]
}

/// Fills the small disk of `process` at `directory`. Returns a file whose removal frees the space.
pub fn fill_disk(process: &Process, directory: &Path) -> PathBuf {
    // Other processes reach the disk through the root directory of `process`.
    let root = PathBuf::from(format!("/proc/{}/root", process.pid()));
    let filler = root.join(directory.strip_prefix("/").unwrap_or(directory)).join("filler");
    let written = fs::write(&filler, vec![0; 64 << 20]);
    assert_eq!(written.map_err(|error| error.kind()), Err(ErrorKind::StorageFull));
    filler
}
