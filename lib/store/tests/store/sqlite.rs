//! Tests of files only: foreign, damaged and busy files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use runtime::Supervisor;
use rusqlite::Connection;
use store::{Config, DatabaseUrl, Objects, OpenError, Store, StoreError};
use testkit::{Scratch, eventually};

use crate::backend::insert;
use crate::{HOUR, close, delete_stale, seen};

/// SQLite's default page size.
const PAGE_BYTES: usize = 4096;

#[tokio::test]
async fn second_owner_is_rejected_and_the_first_continues() {
    let (_directory, path) = closed_file().await;
    let first = start(&path).unwrap();
    let Err(OpenError::InUse { path: busy, .. }) = start(&path) else {
        panic!("not rejected as in use")
    };
    assert_eq!(busy, path);
    first.record_seen(&[seen(0, Duration::ZERO)]).await.unwrap();
    close(first).await;
    assert_eq!(delete_stale(&start(&path).unwrap(), HOUR / 2, 30_000).await.unwrap(), 20_000);
}

#[tokio::test]
async fn file_of_another_program_is_rejected_and_unchanged() {
    let (directory, path) = closed_file().await;
    for text in [String::new(), "Dear SQLite, ".repeat(1_000)] {
        let letter = directory.path().join("letter.txt");
        fs::write(&letter, text).unwrap();
        assert_rejected_as_foreign(&letter).await;
    }
    // The application_id in the header.
    change(&path, |bytes| bytes[68..72].copy_from_slice(b"Mail"));
    assert_rejected_as_foreign(&path).await;
}

#[tokio::test]
async fn file_of_a_newer_version_is_rejected_and_unchanged() {
    let (_directory, path) = closed_file().await;
    // The user_version in the header.
    change(&path, |bytes| bytes[60..64].copy_from_slice(&2_u32.to_be_bytes()));
    let what = assert_rejected_as_foreign(&path).await;
    assert_eq!(what, "its version is 2, this program needs version 1");
}

/// Field case 3.5.
#[tokio::test]
async fn damaged_table_is_kept_and_its_rows_recovered() {
    let (directory, path) = closed_file().await;
    change(&path, |bytes| {
        let pages = bytes.len() / PAGE_BYTES;
        assert!(pages > 10, "{pages} pages");
        bytes[pages / 2 * PAGE_BYTES..][..PAGE_BYTES].fill(0xa5);
    });
    let damaged = fs::read(&path).unwrap();
    let _store = start(&path).unwrap();
    eventually("the rows are recovered", Duration::from_secs(30), async || {
        let mut objects = Objects::open(&config(&path)).await.unwrap();
        // The damaged page contained about 400 rows.
        (objects.page(None, u32::MAX).await.unwrap().len() > 19_000).then_some(())
    })
    .await;
    let mut entries = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    assert!(entries.any(|kept| fs::read(kept).unwrap() == damaged), "the damaged file is not kept");
}

#[tokio::test]
async fn reader_does_not_create_a_missing_file() {
    let directory = Scratch::new("store");
    let path = directory.path().join("objects.db");
    let Err(StoreError::Open(OpenError::Missing { .. })) = Objects::open(&config(&path)).await
    else {
        panic!("not reported as missing")
    };
    assert!(fs::read_dir(directory.path()).unwrap().next().is_none(), "a file was created");
}

#[tokio::test]
async fn sighting_ages_while_another_process_locks_the_file() {
    const WAIT: Duration = Duration::from_millis(300);
    let (_directory, path) = closed_file().await;
    let store = start(&path).unwrap();
    let other = Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();

    let sighting = [seen(0, Duration::ZERO)];
    let (recorded, ()) = tokio::join!(store.record_seen(&sighting), async {
        tokio::time::sleep(WAIT).await;
        other.execute_batch("ROLLBACK").unwrap();
    });
    recorded.unwrap();
    let mut objects = Objects::open(&config(&path)).await.unwrap();
    let page = objects.page(None, 1).await.unwrap();
    assert!(page[0].id == 0 && page[0].age + Duration::from_millis(1) >= WAIT, "{page:?}");
}

/// Field case 4.4.
#[tokio::test]
async fn rows_dated_in_the_future_count_as_seen_now() {
    let (_directory, path) = closed_file().await;
    let other = Connection::open(&path).unwrap();
    let rows = "DELETE FROM object;
                INSERT INTO object VALUES (1, unixepoch() * 1000 + 172800000), (2, 9223372036854775807),
                                          (3, unixepoch() * 1000), (4, 9223372036854775807)";
    other.execute_batch(rows).unwrap();
    drop(other);
    let mut objects = Objects::open(&config(&path)).await.unwrap();
    let page = objects.page(None, 10).await.unwrap();
    assert_eq!(page.len(), 4);
    assert!(page[..2].iter().all(|object| object.age.is_zero()), "{page:?}");

    let store = start(&path).unwrap();
    let recorded = store.record_seen(&[seen(4, HOUR)]).await.unwrap();
    assert_eq!(recorded.updated.len(), 1);
    assert_eq!(delete_stale(&store, HOUR / 2, 10).await.unwrap(), 1);
    assert_eq!(store.correct_future(1).await.unwrap(), 1);
    assert_eq!(store.correct_future(10).await.unwrap(), 1);
    assert_eq!(store.correct_future(10).await.unwrap(), 0);
}

/// A directory with a closed file that contains 20,000 rows.
async fn closed_file() -> (Scratch, PathBuf) {
    let directory = Scratch::new("store");
    let path = directory.path().join("objects.db");
    let store = start(&path).unwrap();
    insert(&store, 1..=20_000, HOUR).await;
    close(store).await;
    (directory, path)
}

fn start(path: &Path) -> Result<Store, OpenError> {
    let database = config(path).open(&Supervisor::default())?;
    Ok(Store::start(database, "test", 1))
}

fn config(path: &Path) -> Config {
    Config::at(DatabaseUrl::file(path.to_owned()))
}

fn change(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Asserts that both the store and a reader reject the file and leave it unchanged. Returns what
/// the errors say about the file.
async fn assert_rejected_as_foreign(path: &Path) -> String {
    let before = fs::read(path).unwrap();
    let by_store = start(path).err().map(StoreError::from);
    let errors = [by_store, Objects::open(&config(path)).await.err()];
    assert!(fs::read(path).unwrap() == before, "the file was changed");
    let [by_store, by_reader] = errors.map(|error| match error {
        Some(StoreError::Open(OpenError::Foreign { what, .. })) => what,
        other => panic!("{} is not rejected as foreign: {other:?}", path.display()),
    });
    assert_eq!(by_store, by_reader);
    by_store
}
