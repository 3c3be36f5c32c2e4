//! Reserves disk space, so that rows can still be deleted when the disk is full.
//!
//! Decision: docs/decisions/0008-how-is-the-spool-emptied-on-a-full-disk.md

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::open::create_private_file;
use crate::open_files::{directory_of, unless_missing};

/// A file of zeros beside the SQLite file. A delete first writes to SQLite's write-ahead log, which
/// fails on a full disk. Removing the ballast makes room for the log.
pub(crate) struct Ballast {
    path: PathBuf,
    bytes: u64,
    is_reserved: bool,
}

impl Ballast {
    /// Reserves `bytes` if the disk has room. 0 bytes disable the ballast.
    pub(crate) fn new(path: PathBuf, bytes: u64) -> Self {
        let mut ballast = Self { path, bytes, is_reserved: false };
        ballast.reserve();
        ballast
    }

    /// Whether there is no ballast, because it was released or the disk never had room for it. The
    /// free space that is left is then only for requests that free space.
    pub(crate) fn is_released(&self) -> bool {
        !self.is_reserved
    }

    pub(crate) fn release(&mut self) {
        if self.bytes == 0 || !self.is_reserved {
            return;
        }
        let path = self.path.display();
        if let Err(error) = unless_missing(fs::remove_file(&self.path)) {
            tracing::warn!(
                %path, %error,
                "the disk is full, and the ballast cannot be released: free some space"
            );
            return;
        }
        tracing::warn!(
            %path,
            "the disk is full: released the ballast, so that rows can be deleted; free some space"
        );
        self.is_reserved = false;
    }

    /// Writes the ballast if it is missing and the disk has room for twice its size. With less
    /// room, the ballast would be reserved and released again and again.
    pub(crate) fn reserve(&mut self) {
        let exists = fs::metadata(&self.path).is_ok_and(|metadata| metadata.len() == self.bytes);
        let has_room = || free_bytes(&self.path).is_none_or(|free| free >= 2 * self.bytes);
        self.is_reserved = self.bytes == 0 || exists || (has_room() && self.write().is_ok());
    }

    fn write(&self) -> io::Result<()> {
        let write = || {
            let mut file = create_private_file(&self.path)?;
            io::copy(&mut io::repeat(0).take(self.bytes), &mut file)?;
            file.sync_all()
        };
        write().inspect_err(|_| {
            // A partial ballast wastes space.
            let _ = fs::remove_file(&self.path);
        })
    }
}

/// The bytes that this user may still write on the disk of `path`; `None` if the system does not
/// report them.
fn free_bytes(path: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(directory_of(path)).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}
