//! Replaces a file as a whole.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Writes a new file and then renames it, so that a crash leaves the old or the new one. Creates
/// the directory if it is missing. `write` must sync the file.
pub(crate) fn replace_file(
    path: &Path,
    write: impl FnOnce(File) -> io::Result<()>,
) -> io::Result<()> {
    let unfinished = with_suffix(path, ".new");
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = parent.unwrap_or(Path::new("."));
    fs::create_dir_all(directory)?;
    // A process that was killed may have left it behind.
    unless_missing(fs::remove_file(&unfinished))?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished);
    let written = file.and_then(write).and_then(|()| {
        fs::rename(&unfinished, path)?;
        File::open(directory)?.sync_all()
    });
    if written.is_err() {
        _ = fs::remove_file(&unfinished);
    }
    written
}

pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(suffix);
    name.into()
}

/// Treats the error for a missing file as success.
fn unless_missing(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })
}
