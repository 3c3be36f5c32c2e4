//! The files that an open SQLite file consists of, and the names of those that were set aside.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::open::{directory_of, with_suffix};

pub(crate) const LOG: &str = "-wal";
pub(crate) const INDEX: &str = "-shm";
const LOCK: &str = ".lock";
/// Kept after damage; its readable rows are still to be carried over.
const DAMAGED: &str = ".damaged-";
/// Kept after damage; its readable rows have been carried over.
const SALVAGED: &str = ".salvaged-";

/// Which file it is, whatever its name: device and inode.
type Identity = (u64, u64);

// Decision: docs/decisions/0061-how-is-a-removed-file-detected.md
/// The files behind an open database. SQLite keeps writing to them after somebody has removed or
/// replaced them, and what it writes then is gone with the process.
#[derive(Debug)]
pub(crate) struct OpenFiles {
    main: (PathBuf, Option<Identity>),
    others: [(PathBuf, Option<Identity>); 3],
}

impl OpenFiles {
    /// Notes which files belong to the database at `path`, which must be open.
    pub(crate) fn of(path: &Path) -> Self {
        let note = |path: PathBuf| {
            let identity = fs::metadata(&path).ok().as_ref().map(identity);
            (path, identity)
        };
        Self {
            main: note(path.to_owned()),
            others: [LOG, INDEX, LOCK].map(|suffix| note(with_suffix(path, suffix))),
        }
    }

    /// The first file that is no longer at its place. A file that cannot be looked at counts as there.
    pub(crate) fn missing(&self) -> Option<&Path> {
        let others = self.others.iter().find(|(path, noted)| !is_there(path, *noted));
        let missing = if self.has_main() { others } else { Some(&self.main) };
        missing.map(|(path, _)| path.as_path())
    }

    pub(crate) fn has_main(&self) -> bool {
        is_there(&self.main.0, self.main.1)
    }

    /// Makes way for a new log and index. Those of this database must not be needed any more; others that
    /// have taken their place are kept under another name, since SQLite would take them for its own.
    pub(crate) fn clear_log(&self) -> io::Result<()> {
        for (path, noted) in &self.others[..2] {
            let Ok(metadata) = fs::metadata(path) else { continue };
            if Some(identity(&metadata)) == *noted {
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

fn is_there(path: &Path, noted: Option<Identity>) -> bool {
    let Some(noted) = noted else { return true };
    match fs::metadata(path) {
        Ok(metadata) => noted == identity(&metadata),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

/// Renames the damaged file at `path` together with its log, and returns the new path. A log whose file
/// is gone is renamed as well.
pub(crate) fn set_aside(path: &Path) -> io::Result<PathBuf> {
    let aside = new_name(path);
    let renamed = |suffix| match fs::rename(with_suffix(path, suffix), with_suffix(&aside, suffix))
    {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        renamed => renamed,
    };
    // The file first: without its log it would be opened as it was before the last transactions.
    renamed("")?;
    renamed(LOG)?;
    // The index holds nothing of its own, and a new file must not find it.
    match fs::remove_file(with_suffix(path, INDEX)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::File::open(directory_of(path))?.sync_all()?;
    Ok(aside)
}

/// A name for a damaged file that nothing has yet.
pub(crate) fn new_name(path: &Path) -> PathBuf {
    let is_free = |name: &PathBuf| {
        let taken = |name: &Path| name.exists() || with_suffix(name, LOG).exists();
        !taken(name) && !taken(&salvaged_name(name))
    };
    let name = |number: u64| with_suffix(path, &format!("{DAMAGED}{number}"));
    let now = unix_seconds();
    (now..now.saturating_add(1_000)).map(name).find(is_free).unwrap_or_else(|| name(now))
}

/// Renames a file that was set aside, for its readable rows have been carried over.
pub(crate) fn mark_salvaged(aside: &Path) -> io::Result<PathBuf> {
    let salvaged = salvaged_name(aside);
    for suffix in [LOG, INDEX, ""] {
        match fs::rename(with_suffix(aside, suffix), with_suffix(&salvaged, suffix)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            renamed => renamed?,
        }
    }
    Ok(salvaged)
}

fn salvaged_name(aside: &Path) -> PathBuf {
    let name =
        aside.file_name().unwrap_or_default().to_string_lossy().replacen(DAMAGED, SALVAGED, 1);
    aside.with_file_name(name)
}

/// What was set aside of the file at `path` and is still there: first the files that are to be salvaged, then
/// those that have been.
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

/// How large the file at `path` is, and how large its log; 0 for one that is not there.
pub(crate) fn sizes(path: &Path) -> (u64, u64) {
    let size = |path: &Path| fs::metadata(path).map_or(0, |metadata| metadata.len());
    (size(path), size(&with_suffix(path, LOG)))
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
