//! Files of one process, on a real disk.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod opening;
mod writing;

use std::path::{Path, PathBuf};
use std::time::Duration;

use embedded::{File, Format, Table};
use rusqlite::Connection;
use testbed::Scratch;

const PATIENCE: Duration = Duration::from_secs(20);

/// The format of `embedded-sample`.
const FORMAT: Format = Format {
    name: "sample",
    application_id: u32::from_be_bytes(*b"LSte"),
    version: 1,
    schema: "CREATE TABLE number (n INTEGER PRIMARY KEY, filler TEXT) STRICT;",
    ballast_bytes: 0,
    max_bytes: u64::MAX,
    tables: &[Table { from: "number", into: "number", columns: "n, filler" }],
};

const INSERT: &str = "INSERT INTO number (n) VALUES (?1)";

fn path_in(folder: &Scratch) -> PathBuf {
    folder.path().join("sample.db")
}

/// Opens a file that another owner may be closing.
async fn open(path: &Path) -> File {
    testbed::eventually("the file can be opened", PATIENCE, async || {
        match File::open(path, FORMAT) {
            Ok(file) => Some(file),
            Err(embedded::OpenError::InUse { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    })
    .await
}

async fn insert(file: &File, n: i64) -> Result<usize, embedded::WriteError> {
    file.transact(move |connection| connection.execute(INSERT, [n])).await
}

/// The numbers in the file, read through another connection.
fn numbers(path: &Path) -> Vec<i64> {
    all_numbers(&embedded::attach(path, FORMAT).unwrap())
}

fn all_numbers(connection: &Connection) -> Vec<i64> {
    let mut select = connection.prepare("SELECT n FROM number ORDER BY n").unwrap();
    let numbers = select.query_map([], |row| row.get(0)).unwrap();
    numbers.collect::<rusqlite::Result<_>>().unwrap()
}
