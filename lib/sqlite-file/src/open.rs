//! Opens a file. An unusable file is refused and stays unchanged, except that a damaged file is
//! renamed.

use std::fs::{self, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags};

use crate::open_files::{self, LOG, directory_of, unless_missing, with_suffix};

/// How long to wait for a transaction of another process, such as an operator's command.
pub(crate) const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit of the integrity check at the start: enough for about 100 MB, a million messages.
const CHECK_TIMEOUT: Duration = Duration::from_secs(1);
/// SQLite truncates the write-ahead log to this size when it has grown larger.
pub(crate) const LOG_BYTES: u32 = 16 << 20;

/// The content of a file, and how to recognise such a file.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// The name in errors and logs, such as "queue".
    pub name: &'static str,
    /// SQLite's `application_id`, which distinguishes these files from all others.
    pub application_id: u32,
    /// SQLite's `user_version`, raised whenever the schema changes.
    pub version: u32,
    /// The statements that create an empty file.
    pub schema: &'static str,
    /// Statements that add to an existing file what a later release of the program needs, without a
    /// new version. An earlier release still uses the file. They are executed at each start.
    pub additions: &'static str,
    /// Disk space reserved for [`crate::File::transact_on_ballast`], in a separate file; 0 for
    /// none.
    pub ballast_bytes: u64,
    /// Size limit of the file, in bytes. Above it, only [`crate::File::transact_on_ballast`] is
    /// accepted.
    pub max_bytes: u64,
    /// The tables whose rows are salvaged from a damaged file.
    pub tables: &'static [Table],
}

/// A table whose rows are salvaged from a damaged file.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// The table's name in the damaged file.
    pub from: &'static str,
    /// The table of the new file into which the rows are inserted. Existing rows stay unchanged.
    pub into: &'static str,
    /// The columns to copy, separated by commas. Leave out a column that numbers the rows, because
    /// the new file assigns its own numbers.
    pub columns: &'static str,
}

/// The reason why a file was not opened. The file is unchanged, unless it was damaged and therefore
/// renamed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process owns the file.
    #[error(
        "{} is in use by another process{owner}: stop that process, or use another path",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
        /// " (process 42)", or empty if the owner is not known.
        owner: String,
    },
    /// The file does not exist, and the caller does not create it.
    #[error("there is no {name} at {}; Lastseen creates it when it first runs there", path.display())]
    Missing {
        /// The missing file.
        path: PathBuf,
        /// The format's name.
        name: &'static str,
    },
    /// The file has another format.
    #[error(
        "{} is not a {name} of Lastseen ({what}) and was not changed: move it away, or use another path",
        path.display()
    )]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The format's name.
        name: &'static str,
        /// The format that was found.
        what: String,
    },
    /// The file has the right format but cannot be read completely.
    #[error(
        "{} is damaged ({what}); the process that owns it renames it and creates a new {name} at its next start",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The format's name.
        name: &'static str,
        /// The first damage found.
        what: String,
    },
    /// An operation of the operating system failed.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// The operation.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// SQLite refused the file for another reason.
    #[error("cannot open {}: {what}", path.display())]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// The reason in words.
        what: String,
    },
}

/// Locks the file for this process until dropped. The operating system also releases the lock when
/// the process ends in any way.
#[derive(Debug)]
pub(crate) struct Lock(
    #[expect(dead_code, reason = "it is locked for as long as it is open")] fs::File,
);

/// Locks and opens the file for this process, and creates it if it is missing. A damaged file is
/// renamed and replaced by a new one, because otherwise no later start could succeed.
///
/// `read` reads what the caller needs from the file, which may also reveal damage.
pub(crate) fn open_exclusively<T>(
    path: &Path,
    format: Format,
    read: impl Fn(&Connection) -> rusqlite::Result<T>,
) -> Result<(Connection, Lock, T), OpenError> {
    create_directory(directory_of(path))?;
    let lock = lock(path)?;
    if path.try_exists().map_err(io_error("look for", path))? {
        check_format(path, format)?;
        match open_checked(path, format, &read) {
            Err(OpenError::Damaged { what, .. }) => set_aside(path, format, &what)?,
            Err(error) => return Err(error),
            Ok((connection, value)) => return Ok((connection, lock, value)),
        }
    } else if with_suffix(path, LOG).try_exists().map_err(io_error("look for", path))? {
        // SQLite would apply this log to the new file.
        set_aside(path, format, "the file is missing, only its -wal exists")?;
    }
    create(path, format)?;
    tracing::info!(path = %path.display(), "created an empty {}", format.name);
    let (connection, value) = open_checked(path, format, &read)?;
    Ok((connection, lock, value))
}

/// Renames a damaged file and keeps it for a person and for [`crate::salvage`].
pub(crate) fn set_aside(path: &Path, format: Format, reason: &str) -> Result<(), OpenError> {
    let damaged_file = open_files::set_aside(path).map_err(io_error("rename", path))?;
    tracing::error!(
        path = %path.display(), kept_as = %damaged_file.display(), reason,
        "the {} is damaged: renamed it; all readable rows will be copied to a new file",
        format.name
    );
    Ok(())
}

/// Opens the file, checks its integrity and calls `read`.
fn open_checked<T>(
    path: &Path,
    format: Format,
    read: impl Fn(&Connection) -> rusqlite::Result<T>,
) -> Result<(Connection, T), OpenError> {
    let connection = connect(path, format)?;
    let add = || connection.execute_batch(format.additions).and_then(|()| read(&connection));
    let value = check_integrity(&connection, path, format)
        .and_then(|()| add().map_err(|error| sqlite_error(path, format, &error)));
    match value {
        Ok(value) => Ok((connection, value)),
        Err(error) => {
            keep_log_on_close(&connection).map_err(|error| sqlite_error(path, format, &error))?;
            Err(error)
        }
    }
}

/// Makes the connection leave the file and its log unchanged when it closes. Otherwise SQLite moves
/// the log into the file, and then removes any file that has the log's name.
pub(crate) fn keep_log_on_close(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map(drop)
}

/// Checks the file for up to [`CHECK_TIMEOUT`]. Damage in the part that was not checked is found
/// when that part is read.
fn check_integrity(connection: &Connection, path: &Path, format: Format) -> Result<(), OpenError> {
    let started = Instant::now();
    let out_of_time = move || started.elapsed() > CHECK_TIMEOUT;
    let check = || {
        connection.progress_handler(1_000, Some(out_of_time))?;
        let result = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0));
        connection.progress_handler(0, None::<fn() -> bool>)?;
        result
    };
    match check() {
        Ok(result) if result == "ok" => Ok(()),
        Ok(damage) => Err(damaged(path, format, damage)),
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::OperationInterrupted) => Ok(()),
        Err(error) => Err(sqlite_error(path, format, &error)),
    }
}

/// Opens an existing file, which another process may own, for reading or for a short transaction.
///
/// # Errors
/// [`OpenError`], also if the file does not exist: it is not created.
pub fn attach(path: &Path, format: Format) -> Result<Connection, OpenError> {
    check_format(path, format)?;
    connect(path, format)
}

fn connect(path: &Path, format: Format) -> Result<Connection, OpenError> {
    let open = || {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        keep_temporary_data_in_memory(&connection)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        // For macOS, where a plain fsync does not reach the medium.
        connection.pragma_update(None, "fullfsync", true)?;
        connection.pragma_update(None, "trusted_schema", false)?;
        connection.pragma_update_and_check(None, "journal_size_limit", LOG_BYTES, |_| Ok(()))?;
        Ok(connection)
    };
    open().map_err(|error| sqlite_error(path, format, &error))
}

/// Keeps temporary data in memory. Otherwise SQLite would move a savepoint's journal of more than
/// 64 KiB to a temporary file, and each large transaction would fail while the directory for
/// temporary files is full or read-only.
pub(crate) fn keep_temporary_data_in_memory(connection: &Connection) -> rusqlite::Result<()> {
    connection.pragma_update(None, "temp_store", "MEMORY")
}

// Decision: docs/decisions/0064-how-is-a-file-recognised.md
/// Checks the header of the file without changing anything. An ordinary open would first apply the
/// write-ahead log that the last writer left.
///
/// It reads the header through SQLite, because this process may already have the file open: closing
/// a plain file handle would drop all locks that this process has on the file.
fn check_format(path: &Path, format: Format) -> Result<(), OpenError> {
    let Format { name, application_id, version, .. } = format;
    if !path.try_exists().map_err(io_error("look for", path))? {
        return Err(OpenError::Missing { path: path.to_owned(), name });
    }
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI;
    let header = || -> rusqlite::Result<(i64, i64)> {
        let connection = Connection::open_with_flags(immutable_uri(path), flags)?;
        // While the log is being applied, also after a crash meanwhile, the file may be shorter than
        // its header says. With this setting, SQLite reads the header nevertheless.
        connection.pragma_update(None, "writable_schema", true)?;
        let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get(0));
        Ok((number("application_id")?, number("user_version")?))
    };
    let what = match header() {
        Ok(found) if found == (application_id.into(), version.into()) => return Ok(()),
        Ok((found, found_version)) if found == i64::from(application_id) => {
            format!("its version is {found_version}, this program needs version {version}")
        }
        Ok(_) => "another program's SQLite file, or an empty one".to_owned(),
        Err(error) if error.sqlite_error_code() == Some(ErrorCode::NotADatabase) => {
            "not a SQLite file".to_owned()
        }
        Err(error) => return Err(sqlite_error(path, format, &error)),
    };
    Err(OpenError::Foreign { path: path.to_owned(), name, what })
}

/// A URI with which SQLite reads the file without locking it or using its log.
fn immutable_uri(path: &Path) -> String {
    let path = percent_encode(path.as_os_str().as_bytes(), NON_ALPHANUMERIC);
    format!("file:{path}?immutable=1")
}

/// Creates an empty file under a temporary name and then renames it, so that a crash leaves no
/// partial file at `path`.
fn create(path: &Path, format: Format) -> Result<(), OpenError> {
    let unfinished = with_suffix(path, ".new");
    let leftovers = [".new", ".new-journal", ".new-wal", ".new-shm"];
    for leftover in leftovers.map(|suffix| with_suffix(path, suffix)) {
        unless_missing(fs::remove_file(&leftover)).map_err(io_error("remove", &leftover))?;
    }
    // SQLite gives its -wal and -shm files the same mode.
    create_private_file(&unfinished).map_err(io_error("create", &unfinished))?;
    let Format { application_id, version, schema, .. } = format;
    let initialise = || {
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
    let mode: String = initialise().map_err(|error| sqlite_error(&unfinished, format, &error))?;
    if mode != "wal" {
        let source = io::Error::other("the file system does not support shared memory for it");
        return Err(io_error("create a write-ahead log for", path)(source));
    }
    fs::rename(&unfinished, path).map_err(io_error("create", path))?;
    sync_directory(directory_of(path))
}

/// Creates an empty file that only this user may read, and opens it.
pub(crate) fn create_private_file(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Creates the directory and its parents.
pub(crate) fn create_directory(directory: &Path) -> Result<(), OpenError> {
    if directory.try_exists().map_err(io_error("look for", directory))? {
        return Ok(());
    }
    let parent = directory_of(directory);
    create_directory(parent)?;
    fs::create_dir(directory).map_err(io_error("create the directory", directory))?;
    sync_directory(parent)
}

/// Syncs the directory, which makes created and renamed files as durable as their content.
pub(crate) fn sync_directory(directory: &Path) -> Result<(), OpenError> {
    let synced = fs::File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(io_error("sync", directory))
}

/// Locks a separate file, because closing any handle of the SQLite file would drop SQLite's locks
/// on that file.
fn lock(path: &Path) -> Result<Lock, OpenError> {
    let lock_path = with_suffix(path, ".lock");
    let mut options = fs::File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let mut file = options.open(&lock_path).map_err(io_error("open", &lock_path))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(error)) => return Err(io_error("lock", &lock_path)(error)),
        Err(TryLockError::WouldBlock) => {
            let mut pid = String::new();
            let is_known = file.read_to_string(&mut pid).is_ok_and(|length| length > 0);
            let owner = if is_known { format!(" (process {})", pid.trim()) } else { String::new() };
            return Err(OpenError::InUse { path: path.to_owned(), owner });
        }
    }
    // Another process that finds the file locked shows this process id in its error.
    let emptied = file.set_len(0).and_then(|()| file.rewind());
    if emptied.and_then(|()| writeln!(file, "{}", std::process::id())).is_err() {
        tracing::debug!(path = %lock_path.display(), "cannot write the process id");
    }
    Ok(Lock(file))
}

pub(crate) fn io_error(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(io::Error) -> OpenError {
    let path = path.to_owned();
    move |source| OpenError::Io { operation, path, source }
}

fn damaged(path: &Path, format: Format, what: String) -> OpenError {
    OpenError::Damaged { path: path.to_owned(), name: format.name, what }
}

fn sqlite_error(path: &Path, format: Format, error: &rusqlite::Error) -> OpenError {
    let what = match error.sqlite_error_code() {
        _ if is_damage(error) => return damaged(path, format, error.to_string()),
        _ if is_full(error) => "the disk is full".to_owned(),
        Some(ErrorCode::ReadOnly | ErrorCode::PermissionDenied) => {
            "this user may not write the file or its directory".to_owned()
        }
        Some(ErrorCode::CannotOpen) => "this user may not open it, or it is not a file".to_owned(),
        _ => error.to_string(),
    };
    OpenError::Sqlite { path: path.to_owned(), what }
}

pub(crate) fn is_damage(error: &rusqlite::Error) -> bool {
    let code = error.sqlite_error_code();
    matches!(code, Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase))
}

pub(crate) fn is_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error().is_some_and(|failure| {
        failure.code == ErrorCode::DiskFull
            || failure.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE
    })
}
