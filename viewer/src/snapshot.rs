//! Saves the view to a file, and restores it at the start, so that a restart forgets no sightings
//! and does not wait for a reading of the table.
//!
//! Decision: docs/decisions/0089-how-does-the-viewer-survive-a-restart.md

mod format;

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use messaging::events::Kind;
use parking_lot::Mutex;
use store::{Change, Extent, History, Presence, StoreError};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep, timeout};

use crate::object::{Object, to_micros};
use crate::replace_file::{replace_file, with_suffix};
use crate::view_state::ViewState;
use format::{BYTES_MAX, Checked, Encoder, Rejection};

/// Minimum interval between two saves.
const SAVE_INTERVAL: Duration = Duration::from_mins(1);
/// Time limit for reading the file.
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit of the save at the end.
const LAST_SAVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Number of changes in one query.
const PAGE_CHANGES: u32 = 10_000;
/// When the changes since the save take longer to apply, the viewer reads the table instead.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause while a transaction that is still running delays the next changes.
const CATCH_UP_PAUSE: Duration = Duration::from_millis(20);

/// The file, and what is saved in it.
pub(crate) struct Snapshot {
    path: PathBuf,
    view: Arc<ViewState>,
    history: History,
    saved: Mutex<Saved>,
}

/// The result of the saves so far. Its mutex is locked during a save.
#[derive(Default)]
struct Saved {
    /// The cursor, and the number of the view's latest change.
    version: Option<(i64, u64)>,
    has_failed: bool,
}

impl Snapshot {
    pub(crate) fn new(path: PathBuf, view: Arc<ViewState>, history: History) -> Arc<Self> {
        Arc::new(Self { path, view, history, saved: Mutex::default() })
    }

    /// Restores the saved objects and applies the changes since then. Returns whether the view is
    /// complete; otherwise there is no usable snapshot, and the table must be read.
    ///
    /// The objects may be out of date where something changed the table without a change in the
    /// history, so the table must be read afterwards in any case.
    ///
    /// # Errors
    /// When the history cannot be read. The function can then be called again.
    pub(crate) async fn restore(self: &Arc<Self>) -> Result<bool, StoreError> {
        let started = Instant::now();
        let extent = self.history.extent().await?;
        let this = Arc::clone(self);
        let load = spawn_blocking(move || this.load(extent));
        let Ok(loaded) = timeout(LOAD_TIMEOUT, load).await else {
            tracing::error!(
                path = %self.path.display(),
                "reading the snapshot takes too long: reading the table; check the disk"
            );
            return Ok(false);
        };
        // A panic has been logged.
        let Some((file, last)) = loaded.ok().flatten() else { return Ok(false) };
        let (cursor, this) = (file.cursor, Arc::clone(self));
        let add_objects = spawn_blocking(move || this.add_objects(&file));
        if !add_objects.await.unwrap_or(false) {
            return Ok(false);
        }
        self.view.set_clock(self.history.now().await?.time());
        let objects = self.view.len();
        let Some(changes) = self.catch_up(cursor, last).await? else {
            tracing::warn!(
                objects,
                "it takes too long to apply the changes since the snapshot: reading the table; \
                 the sightings in the snapshot are kept"
            );
            return Ok(false);
        };
        self.view.set_cursor(last);
        self.view.mark_complete();
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(objects, changes, seconds, "restored the objects from the snapshot");
        Ok(true)
    }

    /// Adds the objects to the view. Returns whether all are valid. Otherwise a program has written
    /// invalid ones, because the checksum is right. The next reading removes those not online.
    fn add_objects(&self, file: &Checked) -> bool {
        let mut objects = file.objects();
        self.view.restore(objects.by_ref());
        if !objects.is_valid() {
            self.set_aside(".damaged", "an object in it is invalid");
        }
        objects.is_valid()
    }

    /// Reads and checks the file. Sets it aside if it is damaged or foreign. Returns also the
    /// position of the last change.
    fn load(&self, extent: Option<Extent>) -> Option<(Checked, i64)> {
        let bytes = match self.read() {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::error!(
                    path = %self.path.display(), %error,
                    "cannot read the snapshot: reading the table; check the permissions of the file"
                );
                return None;
            }
        };
        match Checked::new(bytes) {
            Ok(file) => self.accept(file, extent),
            Err(reason @ (Rejection::NotASnapshot | Rejection::Version(_))) => {
                self.set_aside(".foreign", &reason.to_string());
                None
            }
            Err(reason) => {
                self.set_aside(".damaged", &reason.to_string());
                None
            }
        }
    }

    /// The content of the file, but not much more than the maximum size.
    fn read(&self) -> io::Result<Vec<u8>> {
        // Opening a FIFO would wait for a writer.
        if !fs::metadata(&self.path)?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let file = File::open(&self.path)?;
        let size = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        let mut bytes = Vec::with_capacity(size.min(BYTES_MAX) + 1);
        file.take(BYTES_MAX as u64 + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// Returns the snapshot with the position of the last change, if the history has all changes
    /// after the cursor. Positions of different histories do not overlap, so a cursor after the
    /// last position is of another history.
    fn accept(&self, file: Checked, extent: Option<Extent>) -> Option<(Checked, i64)> {
        match extent {
            Some(Extent { first, last }) if file.cursor <= last.position => {
                if first.position <= file.cursor.saturating_add(1) {
                    return Some((file, last.position));
                }
                tracing::warn!(
                    path = %self.path.display(),
                    "the history no longer has all changes since the snapshot was saved: reading \
                     the table; the sightings in the snapshot are lost"
                );
            }
            _ => self.set_aside(".foreign", "it was saved with another database, or a later state"),
        }
        None
    }

    /// Renames the file. An earlier file with the new name is replaced, so that at most one of each
    /// kind is kept.
    fn set_aside(&self, suffix: &str, reason: &str) {
        let (path, kept_as) = (self.path.display(), with_suffix(&self.path, suffix));
        match fs::rename(&self.path, &kept_as) {
            Ok(()) => tracing::error!(
                %path, kept_as = %kept_as.display(), reason,
                "the snapshot is not usable: renamed it and reading the table; the sightings in it \
                 are lost; check that VIEWER_SNAPSHOT is a file of this viewer only, and the disk"
            ),
            Err(error) => tracing::error!(
                %path, reason, %error,
                "the snapshot is not usable and cannot be renamed: reading the table; remove the file"
            ),
        }
    }

    /// Applies the changes after the cursor, at least up to the position `last`. Returns their
    /// number, or `None` if that takes too long.
    async fn catch_up(&self, mut cursor: i64, last: i64) -> Result<Option<usize>, StoreError> {
        let deadline = Instant::now() + CATCH_UP_TIMEOUT;
        let mut applied = 0;
        while cursor < last {
            if Instant::now() > deadline {
                return Ok(None);
            }
            let page = self.history.changes_after(cursor, PAGE_CHANGES).await?;
            for changes in page.changes.chunk_by(|one, next| one.presence == next.presence) {
                self.apply(changes);
            }
            applied += page.changes.len();
            match page.changes.last() {
                Some(change) => cursor = change.position,
                None => sleep(CATCH_UP_PAUSE).await,
            }
        }
        Ok(Some(applied))
    }

    /// Applies changes of one kind.
    fn apply(&self, changes: &[Change]) {
        let kind = match changes.first().map(|change| change.presence) {
            Some(Presence::Online) => Kind::Online,
            Some(Presence::Gone) => Kind::Gone,
            None => return,
        };
        let object =
            |change: &Change| Object { id: change.id, last_seen: change.last_seen.micros() };
        self.view.apply(kind, changes.iter().map(object));
    }

    /// Saves the view after readings of the table.
    ///
    /// The objects are copied after the cursor. The changes in between are applied again at the
    /// start, which has no further effect.
    pub(crate) async fn save_repeatedly(self: Arc<Self>) -> Infallible {
        let mut completed = self.view.completed();
        loop {
            // It does not fail, because `self` has the sender.
            _ = completed.changed().await;
            if self.view.cursor().is_some() {
                self.save().await;
                sleep(SAVE_INTERVAL).await;
            }
        }
    }

    pub(crate) async fn save_at_the_end(self: &Arc<Self>) {
        if timeout(LAST_SAVE_TIMEOUT, self.save()).await.is_err() {
            tracing::warn!("saving the snapshot takes too long: the previous one stays in use");
        }
    }

    async fn save(self: &Arc<Self>) {
        let this = Arc::clone(self);
        // A panic has been logged.
        _ = spawn_blocking(move || this.save_changes()).await;
    }

    /// Saves the view if it has changed since the last save.
    fn save_changes(&self) {
        let mut saved = self.saved.lock();
        let Some(cursor) = self.view.cursor() else { return };
        let version = (cursor, self.view.flush());
        if saved.version == Some(version) {
            return;
        }
        let path = self.path.display();
        match replace_file(&self.path, |file| self.write(file, cursor)) {
            Ok(()) => {
                if saved.has_failed {
                    tracing::info!(%path, "saved the snapshot again");
                }
                *saved = Saved { version: Some(version), has_failed: false };
            }
            Err(error) if saved.has_failed => {
                tracing::debug!(%path, %error, "still cannot save the snapshot");
            }
            Err(error) => {
                saved.has_failed = true;
                tracing::warn!(
                    %path, %error,
                    "cannot save the snapshot: a restart would lose the latest sightings; trying \
                     again every minute"
                );
            }
        }
    }

    fn write(&self, file: File, cursor: i64) -> io::Result<()> {
        let now = to_micros(self.view.now());
        let mut encoder = Encoder::new(file, cursor, now, self.view.len());
        let mut first = Some(i64::MIN);
        while let Some(from) = first {
            first = self.view.visit(from, |id, sightings| encoder.add(id, sightings));
            encoder.flush()?;
        }
        encoder.finish()?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use testkit::{LogCapture, Scratch};
    use tracing::Level;

    use super::*;

    fn at(path: PathBuf) -> Arc<Snapshot> {
        let database = store::DatabaseUrl::file(path.with_file_name("store.db"));
        let history = History::new(&store::Config::at(database));
        Snapshot::new(path, Arc::new(ViewState::new()), history)
    }

    #[test]
    fn failed_saves_are_reported_once_until_one_succeeds() {
        let scratch = Scratch::new("snapshot");
        let directory = scratch.path().join("directory");
        fs::write(&directory, "").unwrap();
        let snapshot = at(directory.join("file"));
        snapshot.view.set_cursor(7);
        let save = |level| {
            let log = LogCapture::start(level, "viewer::snapshot");
            snapshot.save_changes();
            log.lines_with("save").len()
        };
        assert_eq!((save(Level::WARN), save(Level::WARN)), (1, 0));
        fs::remove_file(&directory).unwrap();
        assert_eq!(save(Level::INFO), 1);
        // Nothing has changed, so it saves nothing.
        fs::remove_dir_all(&directory).unwrap();
        fs::write(&directory, "").unwrap();
        assert_eq!(save(Level::WARN), 0);
        snapshot.view.set_cursor(8);
        assert_eq!(save(Level::WARN), 1);
    }

    #[test]
    fn file_with_an_invalid_object_is_set_aside() {
        let scratch = Scratch::new("snapshot");
        let path = scratch.path().join("file");
        let mut encoder = Encoder::new(File::create(&path).unwrap(), 7, 0, 2);
        for id in [1, 2, 2] {
            encoder.add(id, &[5].into());
        }
        encoder.finish().unwrap();
        let snapshot = at(path.clone());
        let file = Checked::new(snapshot.read().unwrap()).unwrap();
        assert!(!snapshot.add_objects(&file));
        assert!(!path.exists() && with_suffix(&path, ".damaged").exists());
    }
}
