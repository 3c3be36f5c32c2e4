//! The thread that writes, for all who wait at once.

use std::cell::LazyCell;
use std::iter;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use metrics::Histogram;
use rusqlite::{Connection, TransactionBehavior};
use tokio::sync::{oneshot, watch};

use crate::FileStatus;
use crate::ballast::Ballast;
use crate::open::{self, Format, Identity, Lock, OpenError};

/// How many callers share a commit at most. It bounds how long the first of them waits for the others.
const GROUP_MAX: usize = 1_000;
/// How often a file that could not be written is tried, and how often it is looked for at its place.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// The reason while what room there is belongs to what frees some.
const DISK_FULL: &str = "the disk is full";

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
    status: watch::Receiver<FileStatus>,
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
    /// thread that writes it.
    ///
    /// # Errors
    /// [`OpenError`]; then the file is as it was.
    pub fn open(path: &Path, format: Format) -> Result<Self, OpenError> {
        // Whoever comes by a link must find the same lock.
        let real_path = path.canonicalize().ok().filter(|_| path.is_symlink());
        let path = real_path.as_deref().unwrap_or(path);
        let (connection, lock) = open::own(path, format)?;
        let identity = Identity::of(path)?;
        let (works, asked) = mpsc::channel();
        let (status, watched) = watch::channel(Ok(()));
        let ballast = Ballast::new(open::with_suffix(path, ".ballast"), format.ballast_bytes);
        let writer = Writer {
            path: path.to_owned(),
            identity,
            format,
            ballast,
            connection,
            _lock: lock,
            status,
        };
        std::thread::Builder::new()
            .name(format!("{} writer", format.name))
            .spawn(move || writer.run(&asked))
            .map_err(|source| OpenError::Io {
                operation: "start a thread for",
                path: path.to_owned(),
                source,
            })?;
        Ok(Self { path: path.to_owned(), works, status: watched })
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
        let died = || WriteError { path: self.path.clone(), reason: "its thread has died".into() };
        let asked = Asked { work: Some(work), needs_room, outcome: Err(died()), reply };
        self.works.send(Box::new(asked)).map_err(|_| died())?;
        answer.await.unwrap_or_else(|_| Err(died()))
    }

    /// Whether the file can be written right now.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<FileStatus> {
        self.status.clone()
    }

    /// Closes the file when what was asked for before is done. Dropping it does the same, but says
    /// nothing of the end.
    pub async fn close(self) {
        let Self { works, mut status, .. } = self;
        drop(works);
        while status.changed().await.is_ok() {}
    }

    /// Returns only if the writing thread has died; a service must not outlive it.
    pub async fn died(&self) {
        let mut status = self.status.clone();
        while status.changed().await.is_ok() {}
    }
}

struct Writer {
    path: PathBuf,
    identity: Identity,
    format: Format,
    ballast: Ballast,
    // Dropped in this order: the file is closed before another process can have it, and whoever
    // watches the status hears of the end when both is done.
    connection: Connection,
    _lock: Lock,
    status: watch::Sender<FileStatus>,
}

/// A damaged file is not written any further; the next start will say what to do with it.
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

impl Writer {
    fn run(mut self, asked: &mpsc::Receiver<Box<dyn Work>>) {
        // With the first commit: a file may be opened before there is anybody to record.
        let name = self.format.name;
        let seconds = LazyCell::new(|| commit_seconds(name));
        let mut group = Vec::new();
        let mut looked_at = Instant::now();
        loop {
            match asked.recv_timeout(LOOK_INTERVAL) {
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
            if self.ballast.is_released() {
                let full = WriteError { path: self.path.clone(), reason: DISK_FULL.to_owned() };
                for work in group.extract_if(.., |work| work.needs_room()) {
                    work.reply(Err(full.clone()));
                }
            }
            if !group.is_empty() {
                let (started, changes_before) = (Instant::now(), self.connection.total_changes());
                let committed = self.commit(&mut group);
                let outcome = committed.as_ref().map_err(|error| self.error(error)).copied();
                // Before those who would free something hear of it and try again.
                let could_free = group.iter().any(|work| !work.needs_room());
                if committed.as_ref().is_err_and(is_full) && could_free {
                    self.ballast.release();
                }
                // Before those who hear of the outcome look at the status.
                match &committed {
                    Err(error) if is_damage(error) => {}
                    Err(error) => self.note(Err(error.to_string())),
                    // That nothing was written shows nothing about whether something could be.
                    Ok(()) if self.connection.total_changes() == changes_before => {}
                    Ok(()) => {
                        seconds.record(started.elapsed());
                        if !self.ballast.is_released() {
                            self.note(Ok(()));
                        }
                    }
                }
                for work in group.drain(..) {
                    work.reply(outcome.clone());
                }
                if let Err(error) = committed
                    && is_damage(&error)
                {
                    return self.give_up(&error.to_string());
                }
            }
            if looked_at.elapsed() >= LOOK_INTERVAL {
                looked_at = Instant::now();
                self.probe();
                if !self.identity.is_that_of(&self.path) {
                    return self.give_up("it is no longer where it was");
                }
            }
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

    /// The last word of a thread that ends, and its process with it: what is accepted from here on
    /// would not be kept.
    fn give_up(&self, reason: &str) {
        tracing::error!(path = %self.path.display(), reason, "the file cannot be used any more");
    }

    /// Writes what is there already, to see whether a file that could not be written now can be.
    fn probe(&mut self) {
        self.ballast.take();
        if self.ballast.is_released() {
            self.note(Err(DISK_FULL.to_owned()));
        } else if self.status.borrow().is_err() {
            let version = self.format.version;
            if self.connection.pragma_update(None, "user_version", version).is_ok() {
                self.note(Ok(()));
            }
        }
    }

    fn note(&self, status: FileStatus) {
        let path = self.path.display();
        match (&*self.status.borrow(), &status) {
            (Ok(()), Err(reason)) => tracing::error!(%path, reason, "cannot write; trying again"),
            (Err(_), Ok(())) => tracing::info!(%path, "can be written again"),
            _ => {}
        }
        self.status.send_if_modified(|now| {
            let modified = *now != status;
            *now = status;
            modified
        });
    }
}
