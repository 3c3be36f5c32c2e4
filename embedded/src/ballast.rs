//! Space kept back on the disk, so that a full disk does not stop what would free some.
//!
//! Decision: docs/decisions/0008-how-is-the-spool-emptied-on-a-full-disk.md

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::open::private_file;

/// A file of zeros beside the one that it is for. SQLite cannot even delete on a full disk, because
/// its log grows first; with the ballast thrown off, it can.
pub(crate) struct Ballast {
    path: PathBuf,
    bytes: u64,
    held: bool,
}

impl Ballast {
    /// Ballast of so many bytes; with none, nothing is ever held or released.
    pub(crate) fn new(path: PathBuf, bytes: u64) -> Self {
        let mut ballast = Self { path, bytes, held: false };
        ballast.take();
        ballast
    }

    /// Whether what room there is must be left to work that frees some.
    pub(crate) fn is_released(&self) -> bool {
        !self.held
    }

    pub(crate) fn release(&mut self) {
        if self.bytes > 0 && self.held {
            match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %self.path.display(), %error, "cannot release the ballast");
                }
                _ => {
                    tracing::warn!(path = %self.path.display(), "the disk is full: the ballast is released");
                    self.held = false;
                }
            }
        }
    }

    /// Takes it up again if the disk has room for twice as much, or it would come and go. Somebody may
    /// have removed it.
    pub(crate) fn take(&mut self) {
        let is_there = fs::metadata(&self.path).is_ok_and(|there| there.len() == self.bytes);
        let has_room = || free_bytes(&self.path).is_none_or(|free| free >= 2 * self.bytes);
        self.held = self.bytes == 0 || is_there || (has_room() && self.write().is_ok());
    }

    fn write(&self) -> io::Result<()> {
        let write = || {
            let mut file = private_file(&self.path)?;
            io::copy(&mut io::repeat(0).take(self.bytes), &mut file)?;
            file.sync_all()
        };
        write().inspect_err(|_| {
            // Half a ballast only takes space away.
            let _ = fs::remove_file(&self.path);
        })
    }
}

/// What the disk of the directory has left for us, if it says so.
fn free_bytes(path: &Path) -> Option<u64> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let disk = rustix::fs::statvfs(directory.unwrap_or(Path::new("."))).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}
