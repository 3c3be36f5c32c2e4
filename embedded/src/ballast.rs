//! Reserved disk space, so that requests which free space can still be written on a full disk.
//!
//! Decision: docs/decisions/0008-how-is-the-spool-emptied-on-a-full-disk.md

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use crate::open::create_private_file;

/// A file of zeros beside the SQLite file. SQLite cannot delete rows on a full disk, because its
/// log grows first. After the ballast is released, it can.
pub(crate) struct Ballast {
    path: PathBuf,
    bytes: u64,
    is_reserved: bool,
}

impl Ballast {
    /// Reserves `bytes` if the disk has room. With 0 bytes, there is never anything to release.
    pub(crate) fn new(path: PathBuf, bytes: u64) -> Self {
        let mut ballast = Self { path, bytes, is_reserved: false };
        ballast.reserve();
        ballast
    }

    /// Whether the remaining space is only for requests that free some.
    pub(crate) fn is_released(&self) -> bool {
        !self.is_reserved
    }

    pub(crate) fn release(&mut self) {
        if self.bytes > 0 && self.is_reserved {
            match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    let path = self.path.display();
                    tracing::warn!(
                        %path, %error,
                        "the disk is full, and the ballast cannot be released: free some space"
                    );
                }
                _ => {
                    let path = self.path.display();
                    tracing::warn!(
                        %path,
                        "the disk is full: released the ballast for writes that free space; free more space"
                    );
                    self.is_reserved = false;
                }
            }
        }
    }

    /// Writes the ballast if it is missing and the disk has room for twice its size. With less
    /// room, it would be reserved and released in turn.
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

/// Free bytes for this user on the disk of `path`; `None` if the system does not report them.
fn free_bytes(path: &Path) -> Option<u64> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let disk = rustix::fs::statvfs(directory.unwrap_or(Path::new("."))).ok()?;
    Some(disk.f_bavail.saturating_mul(disk.f_frsize))
}
