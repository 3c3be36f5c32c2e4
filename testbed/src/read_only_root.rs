//! A read-only root file system.

/// A wrapper for [`Process::spawn_wrapped`](crate::Process::spawn_wrapped) that makes all file
/// systems read-only for the process, including the directories for temporary files, like
/// Kubernetes' `readOnlyRootFilesystem`. Only its `SPOOL_DIR` and `LASTSEEN_DIR` stay writable.
pub const WITH_READ_ONLY_ROOT: [&str; 7] = [
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "sh",
    "-ec",
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
];
