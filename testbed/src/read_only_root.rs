//! A file system on which nothing can be written.

/// For [`Process::spawn_wrapped`](crate::Process::spawn_wrapped): makes everything read-only for the
/// process alone, as Kubernetes' `readOnlyRootFilesystem` does, the directories for temporary files
/// included. Only its `SPOOL_DIR` and its `LASTSEEN_DIR`, if it has them, stay writable.
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
