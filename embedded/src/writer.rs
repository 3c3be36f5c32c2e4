//! The thread that writes, for all callers that wait at once.
//!
//! Decision: docs/decisions/0059-why-does-one-thread-write-each-file.md

use std::cell::LazyCell;
use std::iter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use metrics::Histogram;
use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{oneshot, watch};

use crate::FileStatus;
use crate::ballast::Ballast;
use crate::open::{self, BUSY_TIMEOUT, Format, LOG_BYTES, Lock, OpenError};
use crate::open_files::{self, OpenFiles};
use crate::salvage::Salvage;

/// How many callers share a commit at most. It bounds how long the first of them waits for the others.
const GROUP_MAX: usize = 1_000;
/// How often a file that could not be written is tried, and how often all files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A caller that gives up after waiting for so long reports the file as not written. Only a probe that is faster
/// reports it as written again, after a [`LOOK_INTERVAL`] in which no caller has given up.
const SLOW: Duration = Duration::from_millis(250);
/// The reason while what room there is belongs to what frees some.
const DISK_FULL: &str = "the disk is full";
/// Size of a write-ahead log that is reported. It is cut back to [`LOG_BYTES`] as soon as nobody reads any more
/// what it has replaced.
const LARGE_LOG_BYTES: u64 = 256 << 20;

/// Why nothing was written: no part of the work has been done.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot write {}: {reason}", path.display())]
pub struct WriteError {
    path: PathBuf,
    reason: String,
}

/// A file that this process owns, open for writing. When it is dropped, what was asked for before is
/// still done, and then the file is closed.
pub struct File {
    path: PathBuf,
    /// Unbounded: it holds one piece of work for each caller that waits, and while the disk hangs, for
    /// each that has given up; what one holds is for the callers to bound.
    works: mpsc::Sender<Box<dyn Work>>,
    status: Arc<watch::Sender<FileStatus>>,
    /// Whether a caller has given up since the last probe.
    given_up: Arc<AtomicBool>,
    kept: watch::Receiver<FileStatus>,
    /// Closed when the thread has ended.
    ended: watch::Receiver<()>,
}

/// What one caller wants to have done.
trait Work: Send {
    /// Whether the file may grow by it.
    fn needs_room(&self) -> bool;
    /// Whether the caller has given up.
    fn is_abandoned(&self) -> bool;
    /// Does it within the group's transaction, and keeps what comes of it.
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()>;
    /// It has failed, alone.
    fn fail(&mut self, error: WriteError);
    /// Tells the caller, once the group's transaction is committed or has failed.
    fn reply(self: Box<Self>, group: Result<(), WriteError>);
}

struct Asked<F, T> {
    work: Option<F>,
    needs_room: bool,
    outcome: Result<T, WriteError>,
    reply: oneshot::Sender<Result<T, WriteError>>,
}

impl<T, F> Work for Asked<F, T>
where
    T: Send,
    F: FnOnce(&Connection) -> rusqlite::Result<T> + Send,
{
    fn needs_room(&self) -> bool {
        self.needs_room
    }

    fn is_abandoned(&self) -> bool {
        self.reply.is_closed()
    }

    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        if let Some(work) = self.work.take() {
            self.outcome = Ok(work(connection)?);
        }
        Ok(())
    }

    fn fail(&mut self, error: WriteError) {
        self.outcome = Err(error);
    }

    fn reply(self: Box<Self>, group: Result<(), WriteError>) {
        // A caller that no longer waits has given its answer without this.
        let _ = self.reply.send(group.and(self.outcome));
    }
}

impl File {
    /// Opens the file for this process alone, makes it first if it is not there, and starts the
    /// thread that writes it. A damaged file is kept under another name; see [`File::kept`].
    ///
    /// # Errors
    /// [`OpenError`]; then the file is as it was.
    pub fn open(path: &Path, format: Format) -> Result<Self, OpenError> {
        Self::open_and_read(path, format, |_| Ok(())).map(|(file, ())| file)
    }

    /// Like [`File::open`]; also returns what `read` finds in the file before anything else is done to it.
    ///
    /// # Errors
    /// As there.
    pub fn open_and_read<T>(
        path: &Path,
        format: Format,
        read: impl Fn(&Connection) -> rusqlite::Result<T>,
    ) -> Result<(Self, T), OpenError> {
        // Whoever comes by a link must find the same lock.
        let real_path = path.canonicalize().ok().filter(|_| path.is_symlink());
        let path = real_path.as_deref().unwrap_or(path);
        let (connection, lock, known) = open::own(path, format, read)?;
        let (works, asked) = mpsc::channel();
        let status = Arc::new(watch::Sender::new(Ok(())));
        let given_up = Arc::new(AtomicBool::new(false));
        let (kept_status, kept) = watch::channel(Ok(()));
        let (end, ended) = watch::channel(());
        let writer = Writer {
            path: path.to_owned(),
            files: OpenFiles::of(path),
            format,
            ballast: Ballast::new(open::with_suffix(path, ".ballast"), format.ballast_bytes),
            salvage: None,
            cannot_rename: false,
            log_is_large: false,
            connection,
            _lock: lock,
            status: Arc::clone(&status),
            given_up: Arc::clone(&given_up),
            kept: kept_status,
            _end: end,
        };
        std::thread::Builder::new()
            .name(format!("{} writer", format.name))
            .spawn(move || writer.run(&asked))
            .map_err(|source| OpenError::Io {
                operation: "start a thread for",
                path: path.to_owned(),
                source,
            })?;
        Ok((Self { path: path.to_owned(), works, status, given_up, kept, ended }, known))
    }

    /// Runs `work` within a transaction, shared with whoever else asks meanwhile, and returns when
    /// that is committed and on disk. If this future is dropped, the work may be done all the same.
    ///
    /// # Errors
    /// [`WriteError`], when `work` fails or the commit: then none of it is done.
    pub async fn transact<T, F>(&self, work: F) -> Result<T, WriteError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        self.ask(work, true).await
    }

    /// Like [`File::transact`], for work by which the file does not grow: it reads, or it frees. If the
    /// format has ballast, such work succeeds on a full disk too, if only when it is tried again.
    ///
    /// # Errors
    /// As there.
    pub async fn transact_on_ballast<T, F>(&self, work: F) -> Result<T, WriteError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        self.ask(work, false).await
    }

    async fn ask<T, F>(&self, work: F, needs_room: bool) -> Result<T, WriteError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let ended =
            || WriteError { path: self.path.clone(), reason: "its thread has ended".into() };
        let asked = Asked { work: Some(work), needs_room, outcome: Err(ended()), reply };
        self.works.send(Box::new(asked)).map_err(|_| ended())?;
        let waiting = Waiting { file: self, since: Instant::now() };
        let answer = answer.await;
        std::mem::forget(waiting);
        answer.unwrap_or_else(|_| Err(ended()))
    }

    /// Whether the file can be written right now. While it cannot, the thread tries so each second.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<FileStatus> {
        self.status.subscribe()
    }

    /// `Err` while a damaged file is kept beside this one: which, and what is to be done with it.
    #[must_use]
    pub fn kept(&self) -> watch::Receiver<FileStatus> {
        self.kept.clone()
    }

    /// Closes the file when what was asked for before is done. Dropping it does the same, but says
    /// nothing of the end.
    pub async fn close(self) {
        let Self { works, mut ended, .. } = self;
        drop(works);
        while ended.changed().await.is_ok() {}
    }

    /// Returns only if the writing thread has ended, because the file is damaged or no longer at its place.
    /// Nothing that is asked for from then on is done; opened again, the path leads to a file that works.
    pub async fn died(&self) {
        let mut ended = self.ended.clone();
        while ended.changed().await.is_ok() {}
    }
}

// Decision: docs/decisions/0062-how-is-a-hanging-disk-reported.md
/// A caller that waits. Dropped, it has given up.
struct Waiting<'a> {
    file: &'a File,
    since: Instant,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        // While the disk hangs, the thread that would notice hangs with it.
        if self.since.elapsed() >= SLOW {
            self.file.given_up.store(true, Ordering::Relaxed);
            note(&self.file.status, &self.file.path, Err(format!("not written within {SLOW:?}")));
        }
    }
}

/// Publishes the status, and logs that it has changed between good and bad.
fn note(sender: &watch::Sender<FileStatus>, path: &Path, status: FileStatus) {
    sender.send_if_modified(|now| {
        let path = path.display();
        match (&*now, &status) {
            (Ok(()), Err(reason)) => {
                tracing::error!(%path, reason, "cannot write; trying again every second");
            }
            (Err(_), Ok(())) => tracing::info!(%path, "can be written again"),
            _ => {}
        }
        let modified = *now != status;
        *now = status;
        modified
    });
}

struct Writer {
    path: PathBuf,
    files: OpenFiles,
    format: Format,
    ballast: Ballast,
    /// The damaged file that is being read.
    salvage: Option<Salvage>,
    /// Whether a damaged file could not be renamed: then this process salvages nothing more.
    cannot_rename: bool,
    log_is_large: bool,
    // Dropped in this order: the file is closed before another process can have it, and whoever
    // waits for the end hears of it when both is done.
    connection: Connection,
    _lock: Lock,
    status: Arc<watch::Sender<FileStatus>>,
    given_up: Arc<AtomicBool>,
    kept: watch::Sender<FileStatus>,
    _end: watch::Sender<()>,
}

fn is_damage(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
    matches!(error.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase))
}

fn is_full(error: &rusqlite::Error) -> bool {
    let code = error.sqlite_error();
    let shm =
        |code: &rusqlite::ffi::Error| code.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE;
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull) || code.is_some_and(shm)
}

fn commit_seconds(file: &'static str) -> Histogram {
    metrics::describe_histogram!(
        "lastseen_commit_seconds",
        metrics::Unit::Seconds,
        "Time of one commit to an embedded file, the work of all its callers included."
    );
    metrics::histogram!("lastseen_commit_seconds", "file" => file)
}

fn describe_gauges() {
    metrics::describe_gauge!(
        "lastseen_file_bytes",
        metrics::Unit::Bytes,
        "Size of an embedded file."
    );
    metrics::describe_gauge!(
        "lastseen_file_wal_bytes",
        metrics::Unit::Bytes,
        "Size of an embedded file's write-ahead log."
    );
    metrics::describe_gauge!(
        "lastseen_damaged_files",
        "Damaged files that are kept beside an embedded file, for a person."
    );
}

/// Why the thread ends although the file is not closed.
enum Fate {
    Damaged(String),
    Gone(PathBuf),
}

impl Writer {
    fn run(mut self, asked: &mpsc::Receiver<Box<dyn Work>>) {
        // With the first commit: a file may be opened before there is anybody to record.
        let name = self.format.name;
        let seconds = LazyCell::new(|| commit_seconds(name));
        let described = LazyCell::new(describe_gauges);
        let mut group = Vec::new();
        let mut looked_at = Instant::now();
        loop {
            let can_salvage = self.salvage.is_some()
                && self.status.borrow().is_ok()
                && self.refuses_growth().is_none();
            let wait = if can_salvage { Duration::ZERO } else { LOOK_INTERVAL };
            match asked.recv_timeout(wait) {
                // While the last commit was under way, others have asked.
                Ok(first) => {
                    let others = asked.try_iter().take(GROUP_MAX - 1);
                    group.extend(iter::once(first).chain(others));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            // On a disk that hangs, callers give up and come again: what they gave up must not pile up.
            group.retain(|work| !work.is_abandoned());
            if group.iter().any(|work| work.needs_room())
                && let Some(reason) = self.refuses_growth()
            {
                self.note(Err(reason.clone()));
                let refused = WriteError { path: self.path.clone(), reason };
                for work in group.extract_if(.., |work| work.needs_room()) {
                    work.reply(Err(refused.clone()));
                }
            }
            if !group.is_empty()
                && let Err(fate) = self.commit_and_reply(&mut group, &seconds)
            {
                return self.end(fate);
            }
            if can_salvage && let Err(fate) = self.salvage_some() {
                return self.end(fate);
            }
            if looked_at.elapsed() >= LOOK_INTERVAL {
                looked_at = Instant::now();
                LazyCell::force(&described);
                self.probe();
                self.measure();
                self.look_for_kept_files();
                if let Some(gone) = self.files.missing() {
                    let gone = gone.to_owned();
                    self.secure();
                    return self.end(Fate::Gone(gone));
                }
            }
        }
    }

    fn commit_and_reply(
        &mut self,
        group: &mut Vec<Box<dyn Work>>,
        seconds: &Histogram,
    ) -> Result<(), Fate> {
        let (started, changes_before) = (Instant::now(), self.connection.total_changes());
        let committed = self.commit(group);
        let mut outcome = committed.as_ref().map_err(|error| self.error(error)).copied();
        let has_written = committed.is_ok() && self.connection.total_changes() != changes_before;
        let gone = self.files.missing().map(Path::to_owned);
        // The commit may be in a file that is lost with this process: no caller may rely on it before it is
        // in another.
        if let Some(gone) = &gone
            && !self.secure()
            && has_written
        {
            let reason = format!("{} was removed or replaced", gone.display());
            outcome = Err(WriteError { path: self.path.clone(), reason });
        }
        // Before those who would free something hear of it and try again.
        let could_free = group.iter().any(|work| !work.needs_room());
        if committed.as_ref().is_err_and(is_full) && could_free {
            self.ballast.release();
        }
        // Before those who hear of the outcome look at the status.
        match &committed {
            Err(error) if is_damage(error) => {}
            Err(error) => self.note(Err(error.to_string())),
            Ok(()) if !has_written => {}
            Ok(()) => {
                seconds.record(started.elapsed());
                if let Some(reason) = self.refuses_growth() {
                    self.note(Err(reason));
                }
            }
        }
        for work in group.drain(..) {
            work.reply(outcome.clone());
        }
        match (committed, gone) {
            (Err(error), _) if is_damage(&error) => Err(Fate::Damaged(error.to_string())),
            (_, Some(gone)) => Err(Fate::Gone(gone)),
            _ => Ok(()),
        }
    }

    /// Does all work of the group within one transaction. What fails by itself is undone by itself.
    fn commit(&mut self, group: &mut [Box<dyn Work>]) -> rusqlite::Result<()> {
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let run = |sql| transaction.prepare_cached(sql)?.execute([]);
        for work in group {
            run("SAVEPOINT work")?;
            if let Err(error) = work.run(&transaction) {
                // SQLite may have ended the whole transaction, as it does when the disk is full.
                if transaction.is_autocommit() || is_damage(&error) {
                    return Err(error);
                }
                run("ROLLBACK TO work")?;
                work.fail(WriteError { path: self.path.clone(), reason: error.to_string() });
            }
            run("RELEASE work")?;
        }
        transaction.commit()
    }

    fn error(&self, error: &rusqlite::Error) -> WriteError {
        WriteError { path: self.path.clone(), reason: error.to_string() }
    }

    /// Why the file may not grow for now, if it may not.
    fn refuses_growth(&self) -> Option<String> {
        if self.ballast.is_released() {
            return Some(DISK_FULL.to_owned());
        }
        let max_bytes = self.format.max_bytes;
        let is_full = max_bytes < u64::MAX && bytes_in_use(&self.connection) >= max_bytes;
        is_full.then(|| format!("it holds the {max_bytes} bytes that it may"))
    }

    /// Moves what this process has committed from files that are gone to a file that is there, and says whether
    /// that has succeeded. Then nothing is lost that was accepted before.
    fn secure(&mut self) -> bool {
        let secured = if self.files.has_main() { self.empty_log() } else { self.copy() };
        match secured {
            Ok(()) => true,
            Err(reason) => {
                let path = self.path.display();
                tracing::error!(%path, reason, "cannot save what was written to a removed file");
                false
            }
        }
    }

    /// Moves all of the log into the file.
    fn empty_log(&self) -> Result<(), String> {
        let busy: bool = self
            .connection
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get(0))
            .map_err(|error| error.to_string())?;
        if busy {
            return Err("another process reads the file".to_owned());
        }
        self.files.clear_log().map_err(|error| error.to_string())
    }

    /// Writes a copy of the whole file beside the place at which it was, from where the next start takes it.
    fn copy(&self) -> Result<(), String> {
        let directory = open::directory_of(&self.path);
        open::make_directory(directory).map_err(|error| error.to_string())?;
        let copy = open_files::new_name(&self.path);
        let into = copy.to_str().ok_or("its path is not Unicode")?;
        open::private_file(&copy).map_err(|error| error.to_string())?;
        self.connection.execute("VACUUM INTO ?1", [into]).map_err(|error| error.to_string())?;
        let synced = std::fs::File::open(&copy).and_then(|copy| copy.sync_all());
        synced.map_err(|error| error.to_string())?;
        open::sync(directory).map_err(|error| error.to_string())?;
        self.files.clear_log().map_err(|error| error.to_string())
    }

    /// The end of a thread that cannot go on with this file. A service that needs the file opens it again, or
    /// ends.
    fn end(&self, fate: Fate) {
        if let Err(error) = open::keep_log_on_close(&self.connection) {
            tracing::warn!(path = %self.path.display(), %error, "cannot close the file as it is");
        }
        let reason = match fate {
            Fate::Damaged(what) => {
                if let Err(error) = open::set_aside(&self.path, self.format, &what) {
                    tracing::error!(path = %self.path.display(), %error, "cannot rename a damaged file");
                }
                format!("damaged: {what}")
            }
            Fate::Gone(gone) => {
                let gone = gone.display();
                tracing::error!(
                    path = %self.path.display(), %gone,
                    "a file in use was removed or replaced: this {} is no longer used", self.format.name
                );
                format!("{gone} was removed or replaced")
            }
        };
        let _ = self.status.send_replace(Err(reason));
    }

    /// Writes what is there already, to see whether a file that could not be written now can be.
    fn probe(&mut self) {
        self.ballast.take();
        if self.status.borrow().is_ok() {
            return;
        }
        if let Some(reason) = self.refuses_growth() {
            return self.note(Err(reason));
        }
        let (started, version) = (Instant::now(), self.format.version);
        let given_up = self.given_up.swap(false, Ordering::Relaxed);
        let written = self.connection.pragma_update(None, "user_version", version);
        match written {
            Ok(()) if given_up || started.elapsed() >= SLOW => {}
            written => self.note(written.map_err(|error| error.to_string())),
        }
    }

    /// Exports the sizes, and reports a log that grows because somebody reads what it has replaced.
    fn measure(&mut self) {
        let name = self.format.name;
        let (_, log_before) = open_files::sizes(&self.path);
        if log_before > 2 * u64::from(LOG_BYTES) {
            // Without waiting: callers would wait as well.
            let cut_back = self.connection.busy_timeout(Duration::ZERO).and_then(|()| {
                self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            });
            if let Err(error) = self.connection.busy_timeout(BUSY_TIMEOUT).and(cut_back) {
                tracing::debug!(path = %self.path.display(), %error, "cannot cut back the log");
            }
        }
        let (file, log) = open_files::sizes(&self.path);
        #[expect(clippy::cast_precision_loss, reason = "no file has more than 2^52 bytes")]
        for (gauge, bytes) in [("lastseen_file_bytes", file), ("lastseen_file_wal_bytes", log)] {
            metrics::gauge!(gauge, "file" => name).set(bytes as f64);
        }
        let is_large = log > LARGE_LOG_BYTES;
        if is_large != std::mem::replace(&mut self.log_is_large, is_large) {
            let path = open::with_suffix(&self.path, open_files::LOG);
            let path = path.display();
            if is_large {
                tracing::warn!(
                    %path, bytes = log,
                    "the write-ahead log grows, because a reader does not finish: end the process that reads the file"
                );
            } else {
                tracing::info!(%path, bytes = log, "the write-ahead log has been cut back");
            }
        }
    }

    /// Reports damaged files, and begins to salvage the oldest of those that have not been. Not before the first
    /// [`LOOK_INTERVAL`] is over: a file may be opened before there is a log.
    fn look_for_kept_files(&mut self) {
        let (damaged, salvaged) = open_files::kept(&self.path);
        #[expect(clippy::cast_precision_loss, reason = "there are few")]
        let count = (damaged.len() + salvaged.len()) as f64;
        metrics::gauge!("lastseen_damaged_files", "file" => self.format.name).set(count);
        let kept = salvaged.last().or(damaged.last()).map(|kept| {
            let kept = kept.display();
            format!("{kept} is kept because it is damaged; once you do not need it, remove it")
        });
        self.kept.send_if_modified(|now| {
            let status = kept.map_or(Ok(()), Err);
            if let (Ok(()), Err(reason)) = (&*now, &status) {
                tracing::error!(reason, "a damaged {} is kept", self.format.name);
            }
            let modified = *now != status;
            *now = status;
            modified
        });
        if self.salvage.is_some() || self.cannot_rename {
            return;
        }
        let Some(aside) = damaged.first() else { return };
        match Salvage::open(aside, self.format) {
            Ok(salvage) => self.salvage = Some(salvage),
            Err(error) => {
                let kept_as = aside.display();
                tracing::error!(%kept_as, %error, "nothing of the damaged file can be read");
                self.mark_salvaged(aside);
            }
        }
    }

    /// Carries over some more rows of the damaged file.
    fn salvage_some(&mut self) -> Result<(), Fate> {
        let Some(salvage) = &mut self.salvage else { return Ok(()) };
        match salvage.step(&mut self.connection) {
            Ok(None) => Ok(()),
            Ok(Some(salvaged)) => {
                let aside = salvage.aside().to_owned();
                self.salvage = None;
                let kept_as = self.mark_salvaged(&aside);
                self.look_for_kept_files();
                tracing::warn!(
                    rows = salvaged.rows, failed_reads = salvaged.failures, kept_as = %kept_as.display(),
                    "what could be read of the damaged file has been carried over"
                );
                Ok(())
            }
            Err(error) if is_damage(&error) => Err(Fate::Damaged(error.to_string())),
            Err(error) => {
                // It goes on once the file can be written.
                self.note(Err(error.to_string()));
                Ok(())
            }
        }
    }

    fn mark_salvaged(&mut self, aside: &Path) -> PathBuf {
        open_files::mark_salvaged(aside).unwrap_or_else(|error| {
            // With its old name it would be salvaged again and again.
            self.cannot_rename = true;
            tracing::error!(path = %aside.display(), %error, "cannot rename a damaged file");
            aside.to_owned()
        })
    }

    fn note(&self, status: FileStatus) {
        note(&self.status, &self.path, status);
    }
}

/// What the file holds, without the pages in it that are free.
fn bytes_in_use(connection: &Connection) -> u64 {
    let sql = "SELECT (page_count - freelist_count) * page_size
               FROM pragma_page_count, pragma_freelist_count, pragma_page_size";
    let bytes =
        connection.prepare_cached(sql).and_then(|mut sql| sql.query_row([], |row| row.get(0)));
    // A file that cannot be read says so when it is written.
    bytes.unwrap_or(0)
}
