//! Tests of `sqlite_file` with files on a real disk.

#![expect(clippy::unwrap_used, reason = "test helpers may panic, too")]

mod opening;
mod writing;

use std::path::{Path, PathBuf};
use std::time::Duration;

use runtime::Supervisor;
use rusqlite::Connection;
use sqlite_file::{File, Format, OpenError, Table};
use testkit::Scratch;

const PATIENCE: Duration = Duration::from_secs(20);

/// The format of `sqlite-file-sample`.
const FORMAT: Format = Format {
    name: "sample",
    application_id: u32::from_be_bytes(*b"LSte"),
    version: 1,
    schema: "CREATE TABLE number (n INTEGER PRIMARY KEY, filler TEXT) STRICT;",
    additions: "",
    ballast_bytes: 0,
    max_bytes: u64::MAX,
    tables: &[Table { from: "number", into: "number", columns: "n, filler" }],
};

const INSERT: &str = "INSERT INTO number (n) VALUES (?1)";

fn path_in(folder: &Scratch) -> PathBuf {
    folder.path().join("sample.db")
}

/// The path of a file that does not exist yet.
fn unused_path() -> (Scratch, PathBuf) {
    let folder = Scratch::new("sqlite-file");
    let path = path_in(&folder);
    (folder, path)
}

/// A new file.
fn sample() -> (Scratch, PathBuf, File) {
    let (folder, path) = unused_path();
    let file = try_open(&path).unwrap();
    (folder, path, file)
}

fn try_open(path: &Path) -> Result<File, OpenError> {
    File::open(path, FORMAT, &Supervisor::default())
}

/// Opens a file that another owner may be closing.
async fn open(path: &Path) -> File {
    testkit::wait_for("the file can be opened", async || match try_open(path) {
        Ok(file) => Some(file),
        Err(OpenError::InUse { .. }) => None,
        Err(error) => panic!("{error}"),
    })
    .await
}

async fn insert(file: &File, n: i64) -> Result<usize, sqlite_file::WriteError> {
    file.transact(move |connection| connection.execute(INSERT, [n])).await
}

/// The numbers in the file, read through another connection.
fn numbers(path: &Path) -> Vec<i64> {
    all_numbers(&sqlite_file::attach(path, FORMAT).unwrap())
}

fn all_numbers(connection: &Connection) -> Vec<i64> {
    let mut select = connection.prepare("SELECT n FROM number ORDER BY n").unwrap();
    let numbers = select.query_map([], |row| row.get(0)).unwrap();
    numbers.collect::<rusqlite::Result<_>>().unwrap()
}
