//! Turns the files of a definition into a tree, with the help of a cache.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Instant;

use groups::{BinaryError, Tree, Weights, parse, source_hash};

use super::config::GroupsConfig;
use super::source::{self, Document, FileState};
use crate::replace_file::replace_file;

/// Maximum size of the cache. The binary form of the largest definition is smaller.
const CACHE_BYTES_MAX: u64 = 512 << 20;

/// Reads definitions. All of its functions block.
#[derive(Clone, Debug)]
pub(super) struct Loader {
    pub(super) file: PathBuf,
    weights: Weights,
    cache: Option<PathBuf>,
}

/// A definition that was read.
pub(super) struct Definition {
    pub(super) tree: Tree,
    /// Identifies the content of the files.
    pub(super) hash: u64,
}

impl Loader {
    /// `None` without `GROUPS_FILE`.
    pub(super) fn new(config: &GroupsConfig) -> Option<Self> {
        let file = config.groups_file.clone()?;
        Some(Self { file, weights: config.groups_weights, cache: config.groups_cache.clone() })
    }

    /// Reads the files. Returns `None` if their content has the hash `known`.
    pub(super) fn load(
        &self,
        files: &[FileState],
        known: Option<u64>,
    ) -> Result<Option<Definition>, String> {
        let started = Instant::now();
        let documents = source::read(files)?;
        let hash = source_hash(documents.iter().map(as_slices));
        if Some(hash) == known {
            return Ok(None);
        }
        let cached = self.read_cache(hash);
        let from_cache = cached.is_some();
        let tree = match cached {
            Some(tree) => tree,
            None => parse(documents.iter().map(as_slices), self.weights)
                .map_err(|error| error.to_string())?,
        };
        if !from_cache {
            self.write_cache(&tree, hash);
        }
        tracing::info!(
            groups = tree.group_count(),
            objects = tree.object_ids().len(),
            from_cache,
            seconds = started.elapsed().as_secs_f64(),
            "read the groups"
        );
        Ok(Some(Definition { tree, hash }))
    }

    /// The tree in the cache, if it is that of the content with this hash.
    fn read_cache(&self, hash: u64) -> Option<Tree> {
        let path = self.cache.as_deref()?;
        let reason = match read_bounded(path) {
            Ok(bytes) => match Tree::from_bytes(&bytes, hash, self.weights) {
                Ok(tree) => return Some(tree),
                Err(BinaryError::OtherSource | BinaryError::OtherVersion(_)) => return None,
                Err(error) => error.to_string(),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            path = %path.display(), reason,
            "the cache of the groups is not usable: reading the definition, and replacing the cache"
        );
        None
    }

    fn write_cache(&self, tree: &Tree, hash: u64) {
        let Some(path) = self.cache.as_deref() else { return };
        let write = |mut file: File| {
            file.write_all(&tree.to_bytes(hash))?;
            file.sync_all()
        };
        if let Err(error) = replace_file(path, write) {
            tracing::warn!(
                path = %path.display(), %error,
                "cannot save the parsed groups: the next start parses the definition again"
            );
        }
    }
}

fn as_slices((name, content): &Document) -> (&str, &[u8]) {
    (name, content)
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // Opening a FIFO would wait for a writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let file = File::open(path)?;
    let size = usize::try_from(file.metadata()?.len().min(CACHE_BYTES_MAX)).unwrap_or(0);
    let mut bytes = Vec::with_capacity(size + 1);
    file.take(CACHE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use testkit::{LogCapture, Scratch};
    use tracing::Level;

    use super::*;

    #[test]
    fn damaged_cache_is_reported_once_and_replaced() {
        let scratch = Scratch::new("groups");
        let file = scratch.path().join("groups.json");
        let cache = scratch.path().join("new/groups.cache");
        let loader =
            Loader { file: file.clone(), weights: Weights::default(), cache: Some(cache.clone()) };
        let load = |definition: &str| {
            fs::write(&file, definition).unwrap();
            let files = source::observe(&file).unwrap();
            loader.load(&files, None).unwrap().unwrap()
        };
        let log = LogCapture::start(Level::WARN, "viewer::groups");
        let is_cached = |hash| loader.read_cache(hash).is_some();
        let first = load(r#"{"name": "a", "objects": [1]}"#);
        assert!(is_cached(first.hash));
        assert_eq!(fs::metadata(&cache).unwrap().permissions().mode() & 0o777, 0o600);
        // Another definition replaces the cache without a warning.
        let second = load(r#"{"name": "b", "objects": [1]}"#);
        assert!(is_cached(second.hash) && !is_cached(first.hash));
        assert_eq!(log.lines_with(""), [""; 0]);

        let mut bytes = fs::read(&cache).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        for damaged in [bytes, b"something else".to_vec(), Vec::new()] {
            fs::write(&cache, damaged).unwrap();
            let before = log.lines_with("the cache of the groups is not usable").len();
            let again = load(r#"{"name": "b", "objects": [1]}"#);
            assert_eq!(again.tree.object_ids(), [1]);
            assert_eq!(log.lines_with("the cache of the groups is not usable").len(), before + 1);
            assert!(is_cached(again.hash));
        }
        let files = source::observe(&file).unwrap();
        assert!(loader.load(&files, Some(second.hash)).unwrap().is_none(), "nothing has changed");
    }
}
