//! The files that make up an open SQLite file, and the names of damaged files that are kept.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The suffix of the write-ahead log.
pub(crate) const LOG: &str = "-wal";
/// The suffix of the index of the write-ahead log.
pub(crate) const INDEX: &str = "-shm";
/// The suffix of the file that a process locks while it owns the SQLite file.
const LOCK: &str = ".lock";
/// A damaged file whose readable rows have not been copied yet.
const DAMAGED: &str = ".damaged-";
/// A damaged file whose readable rows have been copied.
const SALVAGED: &str = ".salvaged-";

/// Device and inode, which identify a file regardless of its name.
type Identity = (u64, u64);

// Decision: docs/decisions/0061-how-is-a-removed-file-detected.md
/// The files of an open database. SQLite keeps writing to a file that was removed or replaced, and
/// these writes are lost when the process ends.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    main: (PathBuf, Option<Identity>),
    others: [(PathBuf, Option<Identity>); 3],
}

impl OpenFiles {
    /// Records the identities of the files of the database at `path`, which must be open.
    pub(crate) fn of(path: &Path) -> Self {
        let identified = |path: PathBuf| {
            let identity = fs::metadata(&path).ok().as_ref().map(identity);
            (path, identity)
        };
        Self {
            main: identified(path.to_owned()),
            others: [LOG, INDEX, LOCK].map(|suffix| identified(with_suffix(path, suffix))),
        }
    }

    /// The first file that was removed or replaced. A file that cannot be inspected counts as
    /// present.
    pub(crate) fn missing(&self) -> Option<&Path> {
        let others = self.others.iter().find(|(path, identity)| !is_same_file(path, *identity));
        let missing = if self.has_main() { others } else { Some(&self.main) };
        missing.map(|(path, _)| path.as_path())
    }

    pub(crate) fn has_main(&self) -> bool {
        is_same_file(&self.main.0, self.main.1)
    }

    /// Removes the write-ahead log and its index. The caller must not need them any more. Other
    /// files that have these names are renamed, because SQLite would use them as its own.
    pub(crate) fn clear_log(&self) -> io::Result<()> {
        for (path, recorded) in &self.others[..2] {
            let Ok(metadata) = fs::metadata(path) else { continue };
            if Some(identity(&metadata)) == *recorded {
                fs::remove_file(path)?;
            } else {
                fs::rename(path, with_suffix(path, &format!(".foreign-{}", unix_seconds())))?;
            }
        }
        Ok(())
    }
}

fn identity(metadata: &Metadata) -> Identity {
    (metadata.dev(), metadata.ino())
}

fn is_same_file(path: &Path, recorded: Option<Identity>) -> bool {
    let Some(recorded) = recorded else { return true };
    match fs::metadata(path) {
        Ok(metadata) => recorded == identity(&metadata),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Renames the damaged file at `path` and its write-ahead log, and returns the new path. The log is
/// renamed even if the file is missing.
pub(crate) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let damaged_file = new_name(path);
    let renamed = |suffix| {
        unless_missing(fs::rename(with_suffix(path, suffix), with_suffix(&damaged_file, suffix)))
    };
    // The file first: if only its log were renamed, the file would open without the latest commits.
    renamed("")?;
    renamed(LOG)?;
    // SQLite can rebuild the index from the log. A new file at this path must not use the old
    // index.
    unless_missing(fs::remove_file(with_suffix(path, INDEX)))?;
    fs::File::open(directory_of(path))?.sync_all()?;
    Ok(damaged_file)
}

/// A path for a damaged file that no other kept file uses.
pub(crate) fn new_name(path: &Path) -> PathBuf {
    let is_free = |name: &PathBuf| {
        let taken = |name: &Path| name.exists() || with_suffix(name, LOG).exists();
        !taken(name) && !taken(&salvaged_name(name))
    };
    let name = |number: u64| with_suffix(path, &format!("{DAMAGED}{number}"));
    let now = unix_seconds();
    (now..now.saturating_add(1_000)).map(name).find(is_free).unwrap_or_else(|| name(now))
}

/// Renames a damaged file after its readable rows have been copied.
pub(crate) fn mark_salvaged(damaged_file: &Path) -> io::Result<PathBuf> {
    let salvaged = salvaged_name(damaged_file);
    for suffix in [LOG, INDEX, ""] {
        let (from, to) = (with_suffix(damaged_file, suffix), with_suffix(&salvaged, suffix));
        unless_missing(fs::rename(from, to))?;
    }
    Ok(salvaged)
}

fn salvaged_name(damaged_file: &Path) -> PathBuf {
    let name = damaged_file
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .replacen(DAMAGED, SALVAGED, 1);
    damaged_file.with_file_name(name)
}

/// The damaged files that are kept beside the file at `path`: first those whose rows have not been
/// copied yet, then the others.
pub(crate) fn kept(path: &Path) -> (Vec<PathBuf>, Vec<PathBuf>) {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let entries = fs::read_dir(directory_of(path)).into_iter().flatten().flatten();
    let (mut damaged, mut salvaged) = (Vec::new(), Vec::new());
    for entry in entries {
        let found = entry.file_name().to_string_lossy().into_owned();
        let Some(rest) = found.strip_prefix(&name) else { continue };
        let is_number =
            |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if rest.strip_prefix(DAMAGED).is_some_and(is_number) {
            damaged.push(entry.path());
        } else if rest.strip_prefix(SALVAGED).is_some_and(is_number) {
            salvaged.push(entry.path());
        }
    }
    damaged.sort();
    salvaged.sort();
    (damaged, salvaged)
}

/// The sizes of the file at `path` and of its log in bytes; 0 for a missing file.
pub(crate) fn sizes(path: &Path) -> (u64, u64) {
    let size = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
    (size(path), size(&with_suffix(path, LOG)))
}

pub(crate) fn directory_of(path: &Path) -> &Path {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Treats the error for a missing file as success.
pub(crate) fn unless_missing(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
