//! The location of a file, as written in the settings.

use std::fmt;
use std::path::{Path, PathBuf};

/// A `sqlite:PATH` URL.
#[derive(Clone)]
pub struct Location(PathBuf);

impl Location {
    /// The file at `path`, which need not exist.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Parses `sqlite:PATH` or `sqlite://PATH`; `None` for anything else.
    #[must_use]
    pub fn from_url(url: &str) -> Option<Self> {
        let path = url.strip_prefix("sqlite:")?;
        let path = path.strip_prefix("//").unwrap_or(path);
        // In-memory databases and SQLite's URI options are rejected, because they could make the
        // data not durable.
        let is_a_path = !path.is_empty() && !path.ends_with('/') && !path.contains([':', '?']);
        is_a_path.then(|| Self::new(path.into()))
    }

    /// The path of the file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for Location {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sqlite:{}", self.0.display())
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_path_is_accepted_after_the_scheme() {
        let path = |url| Location::from_url(url).map(|location| location.0);
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
}
