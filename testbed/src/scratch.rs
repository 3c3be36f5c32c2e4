//! Directories that go away with their owner.

use std::path::{Path, PathBuf};

use uuid::Uuid;

/// A new empty directory, removed with all that is in it on drop.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes one whose name tells `what` it is for.
    #[must_use]
    pub fn new(what: &str) -> Self {
        let name = format!("lastseen-{what}-{}", Uuid::now_v7().simple());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("the temporary directory should be writable");
        Self(path)
    }

    /// Where it is.
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
