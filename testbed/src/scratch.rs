//! Temporary directories that are removed on drop.

use std::path::{Path, PathBuf};

use uuid::Uuid;

/// A new, empty directory. On drop, it and its content are removed.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Creates a directory whose name contains `purpose`.
    #[must_use]
    pub fn new(purpose: &str) -> Self {
        let name = format!("lastseen-{purpose}-{}", Uuid::now_v7().simple());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("the temporary directory should be writable");
        Self(path)
    }

    /// The path of the directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("testbed: {} is left behind: {error}", self.0.display());
        }
    }
}
