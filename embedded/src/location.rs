//! The location of a file, as the settings name it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// A `sqlite:PATH` URL. All clones share one open file `T`, so that the roles of a process open it
/// only once. It is closed when the last role drops it.
pub struct Location<T> {
    path: PathBuf,
    opened: Arc<Mutex<Weak<T>>>,
}

impl<T> Location<T> {
    /// The file at `path`, which need not exist.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, opened: Arc::default() }
    }

    /// Parses `sqlite:PATH` or `sqlite://PATH`; `None` for anything else.
    #[must_use]
    pub fn from_url(url: &str) -> Option<Self> {
        let path = url.strip_prefix("sqlite:")?;
        let path = path.strip_prefix("//").unwrap_or(path);
        // SQLite's in-memory databases and its options are excluded: they would not be durable.
        let is_a_path = !path.is_empty() && !path.ends_with('/') && !path.contains([':', '?']);
        is_a_path.then(|| Self::new(path.into()))
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the file that another clone has open, or opens it by `open`.
    ///
    /// # Errors
    /// The errors of `open`.
    pub fn open<E>(&self, open: impl FnOnce(&Path) -> Result<T, E>) -> Result<Arc<T>, E> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(opened) = opened.upgrade() {
            return Ok(opened);
        }
        let new = Arc::new(open(&self.path)?);
        *opened = Arc::downgrade(&new);
        Ok(new)
    }
}

impl<T> Clone for Location<T> {
    fn clone(&self) -> Self {
        Self { path: self.path.clone(), opened: Arc::clone(&self.opened) }
    }
}

impl<T> fmt::Display for Location<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sqlite:{}", self.path.display())
    }
}

impl<T> fmt::Debug for Location<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_of_a_file_is_only_a_path() {
        let path = |url| Location::<()>::from_url(url).map(|location| location.path);
        assert_eq!(path("sqlite:data/queue.db"), Some("data/queue.db".into()));
        assert_eq!(path("sqlite://queue.db"), Some("queue.db".into()));
        assert_eq!(path("sqlite:///srv/queue.db"), Some("/srv/queue.db".into()));
        for url in [
            "amqp://host",
            "sqlite:",
            "sqlite://",
            "sqlite::memory:",
            "sqlite:a?mode=rw",
            "sqlite:a/",
        ] {
            assert_eq!(path(url), None, "{url}");
        }
    }

    #[test]
    fn clones_share_an_open_file_and_reopen_a_closed_one() {
        let one = Location::<u32>::new("x".into());
        let other = one.clone();
        let first = one.open(|_| Ok::<_, ()>(1)).unwrap();
        assert_eq!(*other.open(|_| Err::<u32, _>("opened twice")).unwrap(), 1);
        drop(first);
        assert_eq!(*other.open(|_| Ok::<_, ()>(2)).unwrap(), 2);
    }
}
