//! Replaces a file as a whole.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Writes a new file and then renames it, so that a crash leaves the old or the new one. Creates
/// the directory if it is missing. `write` must sync the file. Replaces nothing but a regular file,
/// because the path may be that of a device, such as `/dev/null`.
pub(crate) fn replace_file(
    path: &Path,
    write: impl FnOnce(File) -> io::Result<()>,
) -> io::Result<()> {
    if fs::metadata(path).is_ok_and(|existing| !existing.is_file()) {
        return Err(io::Error::other("it is not a regular file"));
    }
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::FileTypeExt as _;
    use std::os::unix::net::UnixListener;

    use testkit::Scratch;

    use super::*;

    #[test]
    fn only_a_regular_file_is_replaced() {
        let scratch = Scratch::new("replace");
        let (file, socket) = (scratch.path().join("new/file"), scratch.path().join("socket"));
        let write = |text: &'static str| {
            move |mut file: File| file.write_all(text.as_bytes()).and_then(|()| file.sync_all())
        };
        replace_file(&file, write("first")).unwrap();
        replace_file(&file, write("second")).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"second");
        let _listener = UnixListener::bind(&socket).unwrap();
        let error = replace_file(&socket, write("third")).unwrap_err();
        assert_eq!(error.to_string(), "it is not a regular file");
        assert!(fs::metadata(&socket).unwrap().file_type().is_socket());
    }
}
