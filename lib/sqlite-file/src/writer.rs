//! The writing thread, which executes the requests of all waiting callers in groups.
//!
//! Decision: docs/decisions/0059-why-does-one-thread-write-each-file.md

use std::cell::LazyCell;
use std::error::Error;
use std::iter;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use metrics::Histogram;
use runtime::{Needed, Running, Status, Supervisor};
use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{oneshot, watch};

use crate::ballast::Ballast;
use crate::open::{self, BUSY_TIMEOUT, Format, LOG_BYTES, Lock, OpenError, is_damage, is_full};
use crate::open_files::{self, OpenFiles};
use crate::salvage::Salvage;

/// Maximum number of requests in one commit, which bounds how long the first caller waits.
const MAX_GROUP_SIZE: usize = 1_000;
/// Interval of the write probe after a failed write, and of the checks for removed files and for
/// damaged files that are kept.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// When a caller gives up after at least this time, the status becomes an error. The status becomes
/// `Ok` again when a write probe takes less than this time and no caller has given up for one
/// [`CHECK_INTERVAL`].
const SLOW_WRITE: Duration = Duration::from_millis(250);
/// The status while the remaining space is only for requests that free space.
const DISK_FULL: &str = "the disk is full";
/// Size of the write-ahead log above which a warning is logged. SQLite truncates the log to
/// [`LOG_BYTES`] when no reader needs it any more.
const LARGE_LOG_BYTES: u64 = 256 << 20;

/// The error of a request of which nothing was written.
#[derive(Clone, Debug, thiserror::Error)]
#[error("cannot write {}: {reason}", path.display())]
pub struct WriteError {
    path: PathBuf,
    reason: String,
}

/// A file that this process owns, open for writing. Dropping it lets the writing thread execute all
/// submitted requests and then close the file.
pub struct File {
    path: PathBuf,
    // Dropped before `requests`, because dropping `requests` ends the writing thread, which must
    // then not count as needed.
    _needed: Needed,
    /// Unbounded: it holds one request for each waiting caller and, while the disk hangs, for each
    /// caller that has given up. The callers limit their own number and the size of each request.
    requests: mpsc::Sender<Box<dyn Request>>,
    status: Arc<watch::Sender<Status>>,
    /// Whether a caller has given up since the last probe.
    has_caller_given_up: Arc<AtomicBool>,
    kept: watch::Receiver<Status>,
    /// Closed when the writing thread has ended.
    ended: watch::Receiver<()>,
}

trait Request: Send {
    /// Whether the request may make the file grow.
    fn may_grow_file(&self) -> bool;
    fn is_abandoned(&self) -> bool;
    /// Executes the request within the group's transaction, and stores its result.
    fn run(&mut self, connection: &Connection) -> rusqlite::Result<()>;
    /// Replaces the result with an error that concerns only this request.
    fn fail(&mut self, error: WriteError);
    /// Sends the result to the caller after the group's transaction has committed or failed.
    fn reply(self: Box<Self>, group: Result<(), WriteError>);
}

struct TypedRequest<F, T> {
    work: Option<F>,
    may_grow_file: bool,
    outcome: Result<T, WriteError>,
    reply: oneshot::Sender<Result<T, WriteError>>,
}

impl<T, F> Request for TypedRequest<F, T>
where
    T: Send,
    F: FnOnce(&Connection) -> rusqlite::Result<T> + Send,
{
    fn may_grow_file(&self) -> bool {
        self.may_grow_file
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
        // A caller that no longer waits needs no result.
        let _ = self.reply.send(group.and(self.outcome));
    }
}

impl File {
    /// Opens the file for this process alone, creates it if it is missing, and starts the writing
    /// thread, which `supervisor` supervises. If the file is damaged, removed or replaced, the
    /// thread ends and all later requests fail. Opening the path again then gives a working file.
    ///
    /// A damaged file is kept under another name; see [`File::kept`].
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, format: Format, supervisor: &Supervisor) -> Result<Self, OpenError> {
        Self::open_and_read(path, format, supervisor, |_| Ok(())).map(|(file, ())| file)
    }

    /// Like [`File::open`], but also returns what `read` finds in the file before the first write.
    ///
    /// # Errors
    /// As [`File::open`].
    pub fn open_and_read<T>(
        path: &Path,
        format: Format,
        supervisor: &Supervisor,
        read: impl Fn(&Connection) -> rusqlite::Result<T>,
    ) -> Result<(Self, T), OpenError> {
        // A process that opens the file through a link must find the same lock.
        let real_path = path.canonicalize().ok().filter(|_| path.is_symlink());
        let path = real_path.as_deref().unwrap_or(path);
        let (connection, lock, value) = open::open_exclusively(path, format, read)?;
        let (requests, submitted) = mpsc::channel();
        let status = Arc::new(watch::Sender::new(Ok(())));
        let has_caller_given_up = Arc::new(AtomicBool::new(false));
        let (kept_status, kept) = watch::channel(Ok(()));
        let (end, ended) = watch::channel(());
        let name = format!("{} writer", format.name);
        let (needed, running) = supervisor.register(&name);
        let writer = Writer {
            path: path.to_owned(),
            files: OpenFiles::of(path),
            format,
            ballast: Ballast::new(open_files::with_suffix(path, ".ballast"), format.ballast_bytes),
            salvage: None,
            cannot_rename: false,
            is_log_large: false,
            connection,
            _lock: lock,
            status: Arc::clone(&status),
            has_caller_given_up: Arc::clone(&has_caller_given_up),
            kept: kept_status,
            _running: running,
            _end: end,
        };
        let thread = std::thread::Builder::new().name(name);
        let started = thread.spawn(move || writer.run(&submitted));
        started.map_err(open::io_error("start a thread for", path))?;
        let path = path.to_owned();
        let file =
            Self { path, _needed: needed, requests, status, has_caller_given_up, kept, ended };
        Ok((file, value))
    }

    /// Runs `work` within a transaction, which other callers share, and returns when the
    /// transaction is committed and on disk. If this future is dropped, `work` may still be
    /// executed.
    ///
    /// # Errors
    /// [`WriteError`] if `work` or the commit fails. Then nothing that `work` did is written.
    pub async fn transact<T, F>(&self, work: F) -> Result<T, WriteError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        self.submit(work, true).await
    }

    /// Like [`File::transact`], for work that only reads or frees space. If the format has ballast,
    /// such work also succeeds on a full disk, but perhaps only at the second attempt.
    ///
    /// # Errors
    /// As [`File::transact`].
    pub async fn transact_on_ballast<T, F>(&self, work: F) -> Result<T, WriteError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        self.submit(work, false).await
    }

    async fn submit<T, F>(&self, work: F, may_grow_file: bool) -> Result<T, WriteError>
    where
        T: Send + 'static,
        F: FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    {
        let (reply, result) = oneshot::channel();
        let ended = || WriteError {
            path: self.path.clone(),
            reason: "its writing thread has ended".into(),
        };
        let request =
            TypedRequest { work: Some(work), may_grow_file, outcome: Err(ended()), reply };
        self.requests.send(Box::new(request)).map_err(|_| ended())?;
        let waiting = WaitingCaller { file: self, since: Instant::now() };
        let result = result.await;
        std::mem::forget(waiting);
        result.unwrap_or_else(|_| Err(ended()))
    }

    /// Whether the file can be written now. While it cannot be written, the writing thread probes
    /// it every second.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// `Err` while a damaged file is kept beside this one. The error contains the path of the
    /// damaged file and what to do with it.
    #[must_use]
    pub fn kept(&self) -> watch::Receiver<Status> {
        self.kept.clone()
    }

    /// Executes all submitted requests, closes the file and waits until it is closed.
    pub async fn close(self) {
        let mut ended = self.ended.clone();
        drop(self);
        while ended.changed().await.is_ok() {}
    }

    /// Returns when the writing thread has ended.
    pub async fn ended(&self) {
        let mut ended = self.ended.clone();
        while ended.changed().await.is_ok() {}
    }
}

// Decision: docs/decisions/0062-how-is-a-hanging-disk-reported.md
/// A caller that waits for its result. Dropping this value means that the caller has given up.
struct WaitingCaller<'a> {
    file: &'a File,
    since: Instant,
}

impl Drop for WaitingCaller<'_> {
    fn drop(&mut self) {
        // The caller reports the slow write, because the writing thread itself is blocked by the
        // disk.
        if self.since.elapsed() >= SLOW_WRITE {
            self.file.has_caller_given_up.store(true, Ordering::Relaxed);
            let reason = format!("not written within {SLOW_WRITE:?}");
            publish_status(&self.file.status, &self.file.path, Err(reason));
        }
    }
}

/// Publishes the status, and logs the beginning and the end of an outage.
fn publish_status(sender: &watch::Sender<Status>, path: &Path, status: Status) {
    sender.send_if_modified(|current| {
        let path = path.display();
        match (&*current, &status) {
            (Ok(()), Err(reason)) => {
                tracing::error!(%path, reason, "cannot write the file; trying again every second");
            }
            (Err(_), Ok(())) => tracing::info!(%path, "the file can be written again"),
            _ => {}
        }
        let modified = *current != status;
        *current = status;
        modified
    });
}

struct Writer {
    path: PathBuf,
    files: OpenFiles,
    format: Format,
    ballast: Ballast,
    salvage: Option<Salvage>,
    /// Set when a damaged file could not be renamed. This process then starts no further salvage.
    cannot_rename: bool,
    is_log_large: bool,
    // Dropped in this order: first the file is closed, then another process can lock it, and then
    // the callers that wait for the end are notified.
    connection: Connection,
    _lock: Lock,
    status: Arc<watch::Sender<Status>>,
    has_caller_given_up: Arc<AtomicBool>,
    kept: watch::Sender<Status>,
    _running: Running,
    _end: watch::Sender<()>,
}

fn commit_seconds(file: &'static str) -> Histogram {
    metrics::describe_histogram!(
        "lastseen_commit_seconds",
        metrics::Unit::Seconds,
        "Time of one commit to a SQLite file, including the work of all its callers."
    );
    metrics::histogram!("lastseen_commit_seconds", "file" => file)
}

fn describe_gauges() {
    metrics::describe_gauge!("lastseen_file_bytes", metrics::Unit::Bytes, "Size of a SQLite file.");
    metrics::describe_gauge!(
        "lastseen_file_wal_bytes",
        metrics::Unit::Bytes,
        "Size of a SQLite file's write-ahead log."
    );
    metrics::describe_gauge!(
        "lastseen_damaged_files",
        "Damaged files that are kept beside a SQLite file, for a person."
    );
}

/// The reason why the thread ends although callers still need the file.
enum EndReason {
    /// The file is damaged; the text says how.
    Damaged(String),
    /// This file of the database was removed or replaced.
    Removed(PathBuf),
}

impl Writer {
    fn run(mut self, submitted: &mpsc::Receiver<Box<dyn Request>>) {
        // Metrics are registered late, because a file may be opened before the metrics recorder is
        // installed.
        let name = self.format.name;
        let seconds = LazyCell::new(|| commit_seconds(name));
        let gauge_descriptions = LazyCell::new(describe_gauges);
        let mut group = Vec::new();
        let mut checked_at = Instant::now();
        loop {
            let can_salvage = self.salvage.is_some()
                && self.status.borrow().is_ok()
                && self.growth_refusal().is_none();
            let wait = if can_salvage { Duration::ZERO } else { CHECK_INTERVAL };
            match submitted.recv_timeout(wait) {
                // The group also takes the requests that arrived during the last commit.
                Ok(first) => {
                    let others = submitted.try_iter().take(MAX_GROUP_SIZE - 1);
                    group.extend(iter::once(first).chain(others));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            // While the disk hangs, callers give up and submit again. Abandoned requests must not
            // pile up.
            group.retain(|request| !request.is_abandoned());
            if group.iter().any(|request| request.may_grow_file())
                && let Some(reason) = self.growth_refusal()
            {
                self.publish_status(Err(reason.clone()));
                let refused = WriteError { path: self.path.clone(), reason };
                for request in group.extract_if(.., |request| request.may_grow_file()) {
                    request.reply(Err(refused.clone()));
                }
            }
            if !group.is_empty()
                && let Err(reason) = self.commit_and_reply(&mut group, &seconds)
            {
                return self.end(reason);
            }
            if can_salvage && let Err(reason) = self.salvage_step() {
                return self.end(reason);
            }
            if checked_at.elapsed() >= CHECK_INTERVAL {
                checked_at = Instant::now();
                LazyCell::force(&gauge_descriptions);
                self.probe();
                self.measure();
                self.check_kept_files();
                if let Some(removed) = self.files.missing() {
                    let removed = removed.to_owned();
                    self.save_commits();
                    return self.end(EndReason::Removed(removed));
                }
            }
        }
    }

    fn commit_and_reply(
        &mut self,
        group: &mut Vec<Box<dyn Request>>,
        seconds: &Histogram,
    ) -> Result<(), EndReason> {
        let (started, changes_before) = (Instant::now(), self.connection.total_changes());
        let committed = self.commit(group);
        let mut outcome = committed
            .as_ref()
            .copied()
            .map_err(|error| WriteError { path: self.path.clone(), reason: error.to_string() });
        let has_written = committed.is_ok() && self.connection.total_changes() != changes_before;
        let removed = self.files.missing().map(Path::to_owned);
        // The commit may be in a removed file, whose content is lost when this process ends.
        // Callers must not rely on the commit until it is saved to another file.
        if let Some(removed) = &removed
            && !self.save_commits()
            && has_written
        {
            let reason = format!("{} was removed or replaced", removed.display());
            outcome = Err(WriteError { path: self.path.clone(), reason });
        }
        // The ballast is released before the callers that free space get the error and try again.
        let may_free_space = group.iter().any(|request| !request.may_grow_file());
        if committed.as_ref().is_err_and(is_full) && may_free_space {
            self.ballast.release();
        }
        // The status is published before the callers get their results and read the status.
        match &committed {
            Err(error) if is_damage(error) => {}
            Err(error) => self.publish_status(Err(error.to_string())),
            Ok(()) if !has_written => {}
            Ok(()) => {
                seconds.record(started.elapsed());
                if let Some(reason) = self.growth_refusal() {
                    self.publish_status(Err(reason));
                }
            }
        }
        for request in group.drain(..) {
            request.reply(outcome.clone());
        }
        match (committed, removed) {
            (Err(error), _) if is_damage(&error) => Err(EndReason::Damaged(error.to_string())),
            (_, Some(removed)) => Err(EndReason::Removed(removed)),
            _ => Ok(()),
        }
    }

    /// Executes all requests of the group in one transaction. If a request fails, only that request
    /// is rolled back.
    fn commit(&mut self, group: &mut [Box<dyn Request>]) -> rusqlite::Result<()> {
        let transaction =
            self.connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let run = |sql| transaction.prepare_cached(sql)?.execute([]);
        for request in group {
            run("SAVEPOINT request")?;
            if let Err(error) = request.run(&transaction) {
                // SQLite may have ended the whole transaction, as it does when the disk is full.
                if transaction.is_autocommit() || is_damage(&error) {
                    return Err(error);
                }
                run("ROLLBACK TO request")?;
                request.fail(WriteError { path: self.path.clone(), reason: error.to_string() });
            }
            run("RELEASE request")?;
        }
        transaction.commit()
    }

    /// The reason why the file may not grow now; `None` if it may grow.
    fn growth_refusal(&self) -> Option<String> {
        if self.ballast.is_released() {
            return Some(DISK_FULL.to_owned());
        }
        let max_bytes = self.format.max_bytes;
        let is_full = max_bytes < u64::MAX && bytes_in_use(&self.connection) >= max_bytes;
        is_full.then(|| format!("it has reached its limit of {max_bytes} bytes"))
    }

    /// Saves the commits of this process from removed files to an existing file, so that no
    /// accepted write is lost. Returns whether all are saved.
    fn save_commits(&mut self) -> bool {
        let saved = if self.files.has_main() { self.checkpoint_log() } else { self.copy() };
        let Err(error) = saved else { return true };
        let (path, reason) = (self.path.display(), error.to_string());
        tracing::error!(
            %path, reason,
            "a file in use was removed, and its committed writes cannot be saved: they may be lost"
        );
        false
    }

    /// Moves the whole write-ahead log into the file.
    fn checkpoint_log(&self) -> Result<(), Box<dyn Error>> {
        let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
        if self.connection.query_row(checkpoint, [], |row| row.get::<_, bool>(0))? {
            return Err("another process is reading the file".into());
        }
        Ok(self.files.clear_log()?)
    }

    /// Writes a copy of the whole database beside the path of the removed file. The next start
    /// salvages the copy.
    fn copy(&self) -> Result<(), Box<dyn Error>> {
        let directory = open_files::directory_of(&self.path);
        open::create_directory(directory)?;
        let copy = open_files::new_name(&self.path);
        let into = copy.to_str().ok_or("its path is not Unicode")?;
        open::create_private_file(&copy)?;
        self.connection.execute("VACUUM INTO ?1", [into])?;
        std::fs::File::open(&copy)?.sync_all()?;
        open::sync_directory(directory)?;
        Ok(self.files.clear_log()?)
    }

    /// Ends the thread, because it cannot use this file any more. The process then opens the path
    /// again, or ends.
    fn end(&self, reason: EndReason) {
        if let Err(error) = open::keep_log_on_close(&self.connection) {
            tracing::warn!(path = %self.path.display(), %error, "cannot close the file unchanged");
        }
        let reason = match reason {
            EndReason::Damaged(damage) => {
                if let Err(error) = open::set_aside(&self.path, self.format, &damage) {
                    tracing::error!(path = %self.path.display(), %error, "cannot rename a damaged file");
                }
                format!("damaged: {damage}")
            }
            EndReason::Removed(removed) => {
                let removed = removed.display();
                tracing::error!(
                    path = %self.path.display(), %removed,
                    "a file in use was removed or replaced: closing this {}; it is opened again, or the process ends",
                    self.format.name
                );
                format!("{removed} was removed or replaced")
            }
        };
        let _ = self.status.send_replace(Err(reason));
    }

    /// After a failed write, tests whether the file can be written, by rewriting an existing value.
    fn probe(&mut self) {
        self.ballast.reserve();
        if self.status.borrow().is_ok() {
            return;
        }
        if let Some(reason) = self.growth_refusal() {
            return self.publish_status(Err(reason));
        }
        let (started, version) = (Instant::now(), self.format.version);
        let has_caller_given_up = self.has_caller_given_up.swap(false, Ordering::Relaxed);
        let written = self.connection.pragma_update(None, "user_version", version);
        match written {
            Ok(()) if has_caller_given_up || started.elapsed() >= SLOW_WRITE => {}
            written => self.publish_status(written.map_err(|error| error.to_string())),
        }
    }

    /// Exports the file sizes, truncates a large write-ahead log, and logs when a reader keeps it
    /// large.
    fn measure(&mut self) {
        let name = self.format.name;
        let (_, log_before) = open_files::sizes(&self.path);
        if log_before > 2 * u64::from(LOG_BYTES) {
            // A busy timeout would make callers wait, so there is none here.
            let truncated = self.connection.busy_timeout(Duration::ZERO).and_then(|()| {
                self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))
            });
            if let Err(error) = self.connection.busy_timeout(BUSY_TIMEOUT).and(truncated) {
                tracing::debug!(path = %self.path.display(), %error, "cannot truncate the log");
            }
        }
        let (file, log) = open_files::sizes(&self.path);
        #[expect(clippy::cast_precision_loss, reason = "no file has more than 2^52 bytes")]
        for (gauge, bytes) in [("lastseen_file_bytes", file), ("lastseen_file_wal_bytes", log)] {
            metrics::gauge!(gauge, "file" => name).set(bytes as f64);
        }
        let is_large = log > LARGE_LOG_BYTES;
        if is_large != std::mem::replace(&mut self.is_log_large, is_large) {
            let path = open_files::with_suffix(&self.path, open_files::LOG);
            let path = path.display();
            if is_large {
                tracing::warn!(
                    %path, bytes = log,
                    "the write-ahead log grows because a reader does not finish: end the process that reads the file"
                );
            } else {
                tracing::info!(%path, bytes = log, "the write-ahead log has shrunk again");
            }
        }
    }

    /// Reports the damaged files that are kept, and starts to salvage the oldest one that is not
    /// salvaged yet. This runs for the first time after one [`CHECK_INTERVAL`], because a file may
    /// be opened before the log is set up.
    fn check_kept_files(&mut self) {
        let (damaged, salvaged) = open_files::kept(&self.path);
        #[expect(clippy::cast_precision_loss, reason = "there are few")]
        let count = (damaged.len() + salvaged.len()) as f64;
        metrics::gauge!("lastseen_damaged_files", "file" => self.format.name).set(count);
        let kept = salvaged.last().or(damaged.last()).map(|kept| {
            let kept = kept.display();
            format!("{kept} is a damaged file that was kept; remove it when you no longer need it")
        });
        self.kept.send_if_modified(|current| {
            let status = kept.map_or(Ok(()), Err);
            if let (Ok(()), Err(reason)) = (&*current, &status) {
                tracing::error!(reason, "a damaged {} is kept", self.format.name);
            }
            let modified = *current != status;
            *current = status;
            modified
        });
        if self.salvage.is_some() || self.cannot_rename {
            return;
        }
        let Some(damaged_file) = damaged.first() else { return };
        match Salvage::open(damaged_file, self.format) {
            Ok(salvage) => self.salvage = Some(salvage),
            Err(error) => {
                let kept_as = damaged_file.display();
                tracing::error!(%kept_as, %error, "cannot read any row of the damaged file");
                self.mark_salvaged(damaged_file);
            }
        }
    }

    fn salvage_step(&mut self) -> Result<(), EndReason> {
        let Some(salvage) = &mut self.salvage else { return Ok(()) };
        match salvage.step(&mut self.connection) {
            Ok(None) => Ok(()),
            Ok(Some(salvaged)) => {
                let damaged_file = salvage.damaged_file().to_owned();
                self.salvage = None;
                let kept_as = self.mark_salvaged(&damaged_file);
                self.check_kept_files();
                tracing::warn!(
                    rows = salvaged.rows, failed_reads = salvaged.failures, kept_as = %kept_as.display(),
                    "all readable rows of the damaged file have been copied"
                );
                Ok(())
            }
            Err(error) if is_damage(&error) => Err(EndReason::Damaged(error.to_string())),
            Err(error) => {
                // The next step of the salvage runs when the file can be written again.
                self.publish_status(Err(error.to_string()));
                Ok(())
            }
        }
    }

    fn mark_salvaged(&mut self, damaged_file: &Path) -> PathBuf {
        open_files::mark_salvaged(damaged_file).unwrap_or_else(|error| {
            // Under its old name, the file would be salvaged again and again.
            self.cannot_rename = true;
            tracing::error!(path = %damaged_file.display(), %error, "cannot rename a damaged file");
            damaged_file.to_owned()
        })
    }

    fn publish_status(&self, status: Status) {
        publish_status(&self.status, &self.path, status);
    }
}

/// The bytes of the file, not counting its free pages.
fn bytes_in_use(connection: &Connection) -> u64 {
    let sql = "SELECT (page_count - freelist_count) * page_size
               FROM pragma_page_count, pragma_freelist_count, pragma_page_size";
    let bytes =
        connection.prepare_cached(sql).and_then(|mut sql| sql.query_row([], |row| row.get(0)));
    // If the file cannot be read, the next write reports the failure.
    bytes.unwrap_or(0)
}
