//! Opening a file, or refusing it with nothing changed.

use std::fs::{self, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::open_files::{self, LOG};

/// Another process may be at work on a part of the file, such as a command that an operator gave.
pub(crate) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the start may take to look for damage: some 100 MB, a million messages.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);
/// After a rush, the write-ahead log is cut back to this size.
pub(crate) const LOG_BYTES: u32 = 16 << 20;

/// What is kept in a file, and how such a file is known.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// What it is called in errors, such as "queue".
    pub name: &'static str,
    /// SQLite's `application_id`: it tells our files from all others.
    pub application_id: u32,
    /// SQLite's `user_version`, raised whenever the schema changes.
    pub version: u32,
    /// The statements that make an empty one.
    pub schema: &'static str,
    /// Space kept back on the disk for [`crate::File::transact_on_ballast`], in a file of its own; 0 for none.
    pub ballast_bytes: u64,
    /// How much the file may hold; beyond it, only [`crate::File::transact_on_ballast`] goes on.
    pub max_bytes: u64,
    /// What is carried over to a new file when this one turns out to be damaged.
    pub tables: &'static [Table],
}

/// A table whose rows are carried over from a damaged file.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Its name in the damaged file.
    pub from: &'static str,
    /// The table of the new file that its rows go to; those that it has already stay as they are.
    pub into: &'static str,
    /// The columns that are carried over, separated by commas. One that numbers the rows must not be among
    /// them, for the new file has numbers of its own.
    pub columns: &'static str,
}

/// Why a file was not opened. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process owns it.
    #[error(
        "{} is in use by another process{by}: stop that one, or give this one a place of its own",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// " (process 42)", if it is known.
        by: String,
    },
    /// There is none, and it was not to be made.
    #[error("there is no {name} at {}; it is made when Lastseen first runs there", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
        /// The format's name.
        name: &'static str,
    },
    /// It is somebody else's.
    #[error("{} is not a {name} of Lastseen ({what}); it is left as it is: move it away, or name another place", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The format's name.
        name: &'static str,
        /// What it is instead.
        what: String,
    },
    /// It is ours but cannot be read as a whole.
    #[error("{} is damaged ({what}); the process that owns it keeps it under another name and begins a new {name} at its next start", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The format's name.
        name: &'static str,
        /// The first damage found.
        what: String,
    },
    /// The operating system refused.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
    /// SQLite refused for another reason than those above.
    #[error("cannot open {}: {what}", path.display())]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// Its answer, in words.
        what: String,
    },
}

/// Holds the file for this process until dropped; the operating system lets go of it as well when
/// the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock(
    #[expect(dead_code, reason = "it is locked for as long as it is open")] fs::File,
);

/// Takes the file for this process, and makes it if it is not there. A damaged file is set aside, and a new one
/// is made in its place: refused, it would keep the process from working at each start.
///
/// `read` is what the caller needs to know of the file; damage may show there too.
pub(crate) fn own<T>(
    path: &Path,
    format: Format,
    read: impl Fn(&Connection) -> rusqlite::Result<T>,
) -> Result<(Connection, Lock, T), OpenError> {
    make_directory(directory_of(path))?;
    let lock = lock(path)?;
    if path.try_exists().map_err(failed("look for", path))? {
        recognise(path, format)?;
        match open_whole(path, format, &read) {
            Err(OpenError::Damaged { what, .. }) => set_aside(path, format, &what)?,
            Err(error) => return Err(error),
            Ok((connection, known)) => return Ok((connection, lock, known)),
        }
    } else if with_suffix(path, LOG).try_exists().map_err(failed("look for", path))? {
        // SQLite would take it for the new file's.
        set_aside(path, format, "only its -wal is there")?;
    }
    create(path, format)?;
    tracing::info!(path = %path.display(), "made an empty {}", format.name);
    let (connection, known) = open_whole(path, format, &read)?;
    Ok((connection, lock, known))
}

/// Renames the damaged file, for a person and for [`crate::salvage`].
pub(crate) fn set_aside(path: &Path, format: Format, reason: &str) -> Result<(), OpenError> {
    let aside = open_files::set_aside(path).map_err(failed("rename", path))?;
    tracing::error!(
        path = %path.display(), kept_as = %aside.display(), reason,
        "the {} is damaged: it is kept under another name, and what can be read of it goes to a new one",
        format.name
    );
    Ok(())
}

/// Opens the file and looks for damage.
fn open_whole<T>(
    path: &Path,
    format: Format,
    read: impl Fn(&Connection) -> rusqlite::Result<T>,
) -> Result<(Connection, T), OpenError> {
    let connection = connect(path, format)?;
    let known = look_for_damage(&connection, path, format)
        .and_then(|()| read(&connection).map_err(|error| unopened(path, format, &error)));
    match known {
        Ok(known) => Ok((connection, known)),
        Err(error) => {
            keep_log_on_close(&connection).map_err(|error| unopened(path, format, &error))?;
            Err(error)
        }
    }
}

/// Has the end of the connection leave the file and its log as they are: SQLite would move the log into the
/// file, and remove whatever has the log's name by then.
pub(crate) fn keep_log_on_close(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map(drop)
}

/// Sees that the file is whole, as far as there is time for: what is left out shows when it is read.
fn look_for_damage(connection: &Connection, path: &Path, format: Format) -> Result<(), OpenError> {
    let started = Instant::now();
    let out_of_time = move || started.elapsed() > CHECK_TIMEOUT;
    let check = || {
        connection.progress_handler(1_000, Some(out_of_time))?;
        let verdict = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0));
        connection.progress_handler(0, None::<fn() -> bool>)?;
        verdict
    };
    match check() {
        Ok(verdict) if verdict == "ok" => Ok(()),
        Ok(verdict) => Err(damaged(path, format, verdict)),
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::OperationInterrupted) => Ok(()),
        Err(error) => Err(unopened(path, format, &error)),
    }
}

/// Opens a file beside the process that owns it, to look into it or for a short transaction.
///
/// # Errors
/// [`OpenError`], also when there is no such file: it is not made.
pub fn attach(path: &Path, format: Format) -> Result<Connection, OpenError> {
    recognise(path, format)?;
    connect(path, format)
}

fn connect(path: &Path, format: Format) -> Result<Connection, OpenError> {
    let open = || {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        keep_temporary_data_in_memory(&connection)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        // macOS only: there, a plain fsync does not reach the medium.
        connection.pragma_update(None, "fullfsync", true)?;
        connection.pragma_update(None, "trusted_schema", false)?;
        connection.pragma_update_and_check(None, "journal_size_limit", LOG_BYTES, |_| Ok(()))?;
        Ok(connection)
    };
    open().map_err(|error| unopened(path, format, &error))
}

/// SQLite moves a savepoint's journal of more than 64 KiB to a temporary file, whose directory may be
/// full or read-only: then each large transaction would fail.
pub(crate) fn keep_temporary_data_in_memory(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "temp_store", "MEMORY")
}

// Decision: docs/decisions/0064-how-is-a-file-recognised.md
/// Looks at the head of the file with nothing else touched: an ordinary open would begin by tidying up
/// after whoever has written it.
///
/// By SQLite's means, because the process may have the file open already, and closing a handle of one's
/// own drops all locks that the process has on a file.
fn recognise(path: &Path, format: Format) -> Result<(), OpenError> {
    let Format { name, application_id, version, .. } = format;
    if !path.try_exists().map_err(failed("look for", path))? {
        return Err(OpenError::Missing { path: path.to_owned(), name });
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let head = || -> rusqlite::Result<(i64, i64)> {
        let connection = Connection::open_with_flags(untouched(path), flags)?;
        let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get(0));
        Ok((number("application_id")?, number("user_version")?))
    };
    let what = match head() {
        Ok(found) if found == (application_id.into(), version.into()) => return Ok(()),
        Ok((found, found_version)) if found == i64::from(application_id) => {
            format!("of version {found_version}; this program knows version {version}")
        }
        Ok(_) => "another program's SQLite file, or an empty one".to_owned(),
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::NotADatabase) => {
            "not a SQLite file".to_owned()
        }
        Err(error) => return Err(unopened(path, format, &error)),
    };
    Err(OpenError::Foreign { path: path.to_owned(), name, what })
}

/// The path as a URI by which SQLite reads the file, and neither locks it nor looks at its log.
fn untouched(path: &Path) -> String {
    let path = percent_encode(path.as_os_str().as_bytes(), NON_ALPHANUMERIC);
    format!("file:{path}?immutable=1")
}

/// Makes an empty file under another name first, so that under its own it is never seen half made.
fn create(path: &Path, format: Format) -> Result<(), OpenError> {
    let unfinished = with_suffix(path, ".new");
    let leftovers = [".new", ".new-journal", ".new-wal", ".new-shm"];
    for leftover in leftovers.map(|suffix| with_suffix(path, suffix)) {
        match fs::remove_file(&leftover) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &leftover)(error));
            }
            _ => {}
        }
    }
    // SQLite gives its -wal and -shm files the same mode.
    private_file(&unfinished).map_err(failed("make", &unfinished))?;
    let Format { application_id, version, schema, .. } = format;
    let make = || {
        let connection = Connection::open(&unfinished)?;
        keep_temporary_data_in_memory(&connection)?;
        connection.execute_batch(&format!(
            "BEGIN;
             PRAGMA application_id = {application_id};
             PRAGMA user_version = {version};
             {schema}
             COMMIT;"
        ))?;
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0))
    };
    let mode: String = make().map_err(|error| unopened(&unfinished, format, &error))?;
    if mode != "wal" {
        let source = io::Error::other("the file system does not let it be shared");
        return Err(failed("keep a log beside", path)(source));
    }
    fs::rename(&unfinished, path).map_err(failed("make", path))?;
    sync(directory_of(path))
}

/// Makes an empty file that only its owner may read, and opens it.
pub(crate) fn private_file(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Makes the directory and those above it.
pub(crate) fn make_directory(directory: &Path) -> Result<(), OpenError> {
    if directory.try_exists().map_err(failed("look for", directory))? {
        return Ok(());
    }
    let above = directory_of(directory);
    make_directory(above)?;
    fs::create_dir(directory).map_err(failed("make the directory", directory))?;
    sync(above)
}

/// A name must be as durable as what will be written under it.
pub(crate) fn sync(directory: &Path) -> Result<(), OpenError> {
    let synced = fs::File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(failed("sync", directory))
}

pub(crate) fn directory_of(path: &Path) -> &Path {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    parent.unwrap_or(Path::new("."))
}

/// Beside the file and not on it: closing any handle of a file drops SQLite's own locks on it.
fn lock(path: &Path) -> Result<Lock, OpenError> {
    let lock_path = with_suffix(path, ".lock");
    let options = fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .to_owned();
    let mut file = options.open(&lock_path).map_err(failed("open", &lock_path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(error)) => return Err(failed("lock", &lock_path)(error)),
        Err(TryLockError::WouldBlock) => {
            let mut by = String::new();
            let known = file.read_to_string(&mut by).is_ok_and(|length| length > 0);
            let by = if known { format!(" (process {})", by.trim()) } else { String::new() };
            return Err(OpenError::InUse { path: path.to_owned(), by });
        }
    }
    // For whoever finds it locked; if it cannot be written, they only learn less.
    let note = file.set_len(0).and_then(|()| file.rewind());
    if note.and_then(|()| writeln!(file, "{}", std::process::id())).is_err() {
        tracing::debug!(path = %lock_path.display(), "cannot note the process id");
    }
    Ok(Lock(file))
}

pub(crate) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { operation, path, source }
}

fn damaged(path: &Path, format: Format, what: String) -> OpenError {
    OpenError::Damaged { path: path.to_owned(), name: format.name, what }
}

fn unopened(path: &Path, format: Format, error: &rusqlite::Error) -> OpenError {
    let words = match (error.sqlite_error_code(), error) {
        (Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase), _) => {
            return damaged(path, format, error.to_string());
        }
        (Some(ErrorCode::DiskFull), _) => "the disk is full",
        (Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied), _) => {
            "this user may not write it, or its directory"
        }
        (Some(ErrorCode::CannotOpen), _) => "this user may not open it, or it is no file",
        (_, rusqlite::Error::SqliteFailure(failure, _))
            if failure.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE =>
        {
            "the disk is full"
        }
        _ => "",
    };
    let what = if words.is_empty() { error.to_string() } else { words.to_owned() };
    OpenError::Sqlite { path: path.to_owned(), what }
}
