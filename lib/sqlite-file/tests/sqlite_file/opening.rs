//! Opening, refusing and salvaging files.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;

use runtime::Supervisor;
use rusqlite::Connection;
use sqlite_file::{File, Format, OpenError, attach};
use testkit::{Scratch, wait_for, wait_until};
use tokio::time::timeout;

use crate::{FORMAT, PATIENCE, insert, numbers, open, path_in, try_open, unused_path};

fn names(folder: &Scratch) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(folder.path()).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap())
}

/// All files in `folder` and their contents, except the lock file. No file may be removed
/// meanwhile.
fn contents(folder: &Scratch) -> BTreeMap<String, Vec<u8>> {
    let names = names(folder).filter(|name| name != "sample.db.lock");
    names.map(|name| (name.clone(), fs::read(folder.path().join(name)).unwrap())).collect()
}

/// Copies a database and its write-ahead log, as a killed process leaves them.
fn copy_with_log(from: &Path, to: &Path) {
    for suffix in ["", "-wal"] {
        let name = |path: &Path| format!("{}{suffix}", path.display());
        let bytes = fs::copy(name(from), name(to)).unwrap();
        assert!(bytes > 0, "the test needs a log that is not empty");
    }
}

/// Field case 6.10.
#[tokio::test]
async fn created_files_are_readable_only_by_their_user() {
    let folder = Scratch::new("sqlite-file");
    let file = open(&path_in(&folder)).await;
    insert(&file, 1).await.unwrap();
    let mut names = Vec::new();
    for entry in fs::read_dir(folder.path()).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        assert_eq!(entry.metadata().unwrap().mode() & 0o777, 0o600, "{name}");
        names.push(name);
    }
    assert!(names.iter().any(|name| name.ends_with("-wal")), "{names:?}");
    file.close().await;
}

/// The first page of a file says how many pages it has. SQLite writes it before the other pages.
#[tokio::test]
async fn file_opens_after_a_kill_while_its_log_was_applied() {
    let folder = Scratch::new("sqlite-file");
    let (path, killed) = (path_in(&folder), folder.path().join("killed.db"));
    let file = open(&path).await;
    let insert = "INSERT INTO number (n)
                  WITH RECURSIVE series (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM series LIMIT 2000)
                  SELECT n FROM series";
    file.transact(move |connection| connection.execute(insert, ())).await.unwrap();
    copy_with_log(&path, &killed);
    file.close().await;
    let mut first_page = [0; 4_096];
    fs::File::open(&path).unwrap().read_exact_at(&mut first_page, 0).unwrap();
    let applied = fs::OpenOptions::new().write(true).open(&killed).unwrap();
    applied.write_all_at(&first_page, 0).unwrap();
    assert!(applied.metadata().unwrap().len() < fs::metadata(&path).unwrap().len());

    let file = open(&killed).await;
    assert_eq!(numbers(&killed).len(), 2_000);
    assert!(names(&folder).all(|name| !name.contains("damaged")));
    file.close().await;
}

#[tokio::test]
async fn missing_file_is_created_with_its_directories() {
    let folder = Scratch::new("sqlite-file");
    let path = folder.path().join("new").join("newer").join("sample.db");
    let file = open(&path).await;
    insert(&file, 1).await.unwrap();
    file.close().await;
    assert_eq!(numbers(&path), [1]);
}

#[tokio::test]
async fn reopened_file_contains_all_committed_rows() {
    let (_folder, path) = unused_path();
    for n in 1..4 {
        let file = try_open(&path).unwrap();
        insert(&file, n).await.unwrap();
        file.close().await;
        assert_eq!(numbers(&path), (1..=n).collect::<Vec<_>>());
    }
}

#[test]
fn attaching_to_a_missing_file_creates_nothing() {
    let folder = Scratch::new("sqlite-file");
    let refused = attach(&folder.path().join("sub").join("sample.db"), FORMAT).unwrap_err();
    assert!(matches!(refused, OpenError::Missing { .. }), "{refused}");
    let refused = attach(&path_in(&folder), FORMAT).unwrap_err();
    assert!(matches!(refused, OpenError::Missing { .. }), "{refused}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn second_owner_is_refused_with_the_process_id_of_the_first() {
    let (_folder, path) = unused_path();
    let owner = try_open(&path).unwrap();
    let refused = try_open(&path).err().unwrap();
    assert!(matches!(refused, OpenError::InUse { .. }), "{refused}");
    let process = format!("(process {})", std::process::id());
    assert!(refused.to_string().contains(&process), "{refused}");
    owner.close().await;
    try_open(&path).unwrap();
}

#[tokio::test]
async fn link_to_a_file_in_use_is_refused() {
    let folder = Scratch::new("sqlite-file");
    let _owner = try_open(&path_in(&folder)).unwrap();
    let link = folder.path().join("link.db");
    std::os::unix::fs::symlink(path_in(&folder), &link).unwrap();
    let refused = try_open(&link).err().unwrap();
    assert!(matches!(refused, OpenError::InUse { .. }), "{refused}");
}

#[tokio::test]
async fn attached_connection_sees_commits_of_the_owner_and_can_write() {
    let (_folder, path) = unused_path();
    let owner = try_open(&path).unwrap();
    let attached = attach(&path, FORMAT).unwrap();
    insert(&owner, 1).await.unwrap();
    attached.execute(crate::INSERT, [2]).unwrap();
    insert(&owner, 3).await.unwrap();
    assert_eq!(crate::all_numbers(&attached), [1, 2, 3]);
}

#[test]
fn foreign_file_is_refused_and_not_changed() {
    let text = |path: &Path| fs::write(path, "id;online\n42;yes\n".repeat(1_000)).unwrap();
    assert_refused_as_foreign("text", text);
    assert_refused_as_foreign("a short text", |path| fs::write(path, "x").unwrap());
    assert_refused_as_foreign("an empty file", |path| fs::write(path, "").unwrap());
    let statements = "CREATE TABLE theirs (x); INSERT INTO theirs VALUES (1)";
    assert_refused_as_foreign("a database", |path| {
        Connection::open(path).unwrap().execute_batch(statements).unwrap();
    });
    assert_refused_as_foreign("a database with a log", |path| {
        let elsewhere = Scratch::new("sqlite-file");
        let original = elsewhere.path().join("theirs.db");
        let connection = Connection::open(&original).unwrap();
        connection.execute_batch(&format!("PRAGMA journal_mode = WAL; {statements}")).unwrap();
        copy_with_log(&original, path);
    });
}

fn assert_refused_as_foreign(case: &str, make: impl Fn(&Path)) {
    let (folder, path) = unused_path();
    make(&path);
    let before = contents(&folder);
    for refused in [try_open(&path).err(), attach(&path, FORMAT).err()] {
        let foreign = matches!(refused, Some(OpenError::Foreign { .. }));
        assert!(foreign, "{case}: {refused:?}");
    }
    assert!(contents(&folder) == before, "{case}: it was changed");
}

#[tokio::test]
async fn file_of_another_version_is_refused_and_not_changed() {
    let ((folder, path), elsewhere) = (unused_path(), Scratch::new("sqlite-file"));
    let newer = Format { version: 2, ..FORMAT };
    let original = File::open(&path_in(&elsewhere), newer, &Supervisor::default()).unwrap();
    insert(&original, 1).await.unwrap();
    copy_with_log(&path_in(&elsewhere), &path);
    let before = contents(&folder);
    for refused in [try_open(&path).err(), attach(&path, FORMAT).err()] {
        let refused = refused.unwrap();
        assert!(matches!(refused, OpenError::Foreign { .. }), "{refused}");
        assert!(refused.to_string().contains("its version is 2"), "{refused}");
    }
    assert!(contents(&folder) == before, "it was changed");
    assert_eq!(crate::all_numbers(&attach(&path, newer).unwrap()), [1]);
}

/// Creates a file with about a hundred pages of rows, and one more row in its log.
async fn file_with_log(path: &Path) {
    let elsewhere = Scratch::new("sqlite-file");
    let original = path_in(&elsewhere);
    let file = try_open(&original).unwrap();
    let many = "WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number
                                              WHERE n < 5000)
                INSERT INTO main.number SELECT n, hex(randomblob(100)) FROM number";
    file.transact(move |connection| connection.execute(many, [])).await.unwrap();
    file.close().await;
    let file = open(&original).await;
    insert(&file, 9_999).await.unwrap();
    copy_with_log(&original, path);
}

#[tokio::test]
async fn file_is_opened_with_the_rows_in_its_log() {
    let folder = Scratch::new("sqlite-file");
    file_with_log(&path_in(&folder)).await;
    let file = try_open(&path_in(&folder)).unwrap();
    insert(&file, 10_000).await.unwrap();
    assert_eq!(numbers(&path_in(&folder)).len(), 5_002);
}

/// Overwrites `pages` pages, the first of which is in the middle of the file.
fn damage_the_middle(path: &Path, pages: usize) {
    let file = fs::File::options().write(true).open(path).unwrap();
    let middle = file.metadata().unwrap().len() / 4_096 / 2 * 4_096;
    file.write_all_at(&vec![0xA5; pages * 4_096], middle).unwrap();
}

/// The names in `folder` that start with `prefix`.
fn names_with_prefix(folder: &Scratch, prefix: &str) -> Vec<String> {
    names(folder).filter(|name| name.starts_with(prefix)).collect()
}

/// Field case 3.5.
#[tokio::test]
async fn damaged_file_is_kept_and_its_rows_are_salvaged() {
    let (folder, path) = unused_path();
    file_with_log(&path).await;
    damage_the_middle(&path, 2);
    let damaged = fs::read(&path).unwrap();
    let file = try_open(&path).unwrap();
    insert(&file, 10_000).await.unwrap();
    let newer = "INSERT OR REPLACE INTO number VALUES (1, 'newer')";
    file.transact(move |connection| connection.execute(newer, [])).await.unwrap();
    let kept_as = wait_for("the damaged file is salvaged", async || {
        let names = names_with_prefix(&folder, "sample.db.salvaged-");
        names.into_iter().find(|name| !name.ends_with("-wal") && !name.ends_with("-shm"))
    })
    .await;
    let kept_as = folder.path().join(kept_as);
    assert!(fs::read(&kept_as).unwrap() == damaged, "the damaged file was changed");
    let salvaged = numbers(&path);
    // A page holds about twenty of the 5,001 rows.
    assert!((4_900..5_002).contains(&salvaged.len()), "{}", salvaged.len());
    // The first and the last row of the table, the row that was only in the log, and the row that
    // was inserted after the damage.
    for number in [1, 5_000, 9_999, 10_000] {
        assert!(salvaged.contains(&number), "{number} is missing");
    }
    let filler = "SELECT filler FROM number WHERE n = 1";
    let connection = attach(&path, FORMAT).unwrap();
    let filler: String = connection.query_row(filler, [], |row| row.get(0)).unwrap();
    assert_eq!(filler, "newer", "an older row has replaced it");
    let mut status = file.kept();
    let is_reported = |status: &Result<(), String>| {
        status.as_ref().is_err_and(|reason| reason.contains(kept_as.to_str().unwrap()))
    };
    timeout(PATIENCE, status.wait_for(is_reported)).await.unwrap().unwrap();
    fs::remove_file(&kept_as).unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
}

#[tokio::test]
async fn interrupted_salvage_resumes_at_the_next_start() {
    let (_folder, path) = unused_path();
    file_with_log(&path).await;
    // The state after a process has renamed a damaged file and then ended.
    for suffix in ["", "-wal"] {
        let aside = format!("{}.damaged-7{suffix}", path.display());
        fs::rename(format!("{}{suffix}", path.display()), aside).unwrap();
    }
    let _file = try_open(&path).unwrap();
    wait_until("all rows are salvaged", async || numbers(&path).len() == 5_001).await;
}

#[tokio::test]
async fn log_without_its_file_is_kept_and_not_used_for_a_new_file() {
    let (folder, path) = unused_path();
    file_with_log(&path).await;
    fs::remove_file(&path).unwrap();
    let log = fs::read(format!("{}-wal", path.display())).unwrap();
    let file = try_open(&path).unwrap();
    insert(&file, 1).await.unwrap();
    assert_eq!(numbers(&path), [1]);
    let kept = names_with_prefix(&folder, "sample.db.damaged-");
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert!(fs::read(folder.path().join(&kept[0])).unwrap() == log, "it was changed");
}

#[tokio::test]
async fn leftovers_of_an_interrupted_creation_are_replaced() {
    let (folder, path) = unused_path();
    for suffix in [".new", ".new-journal", ".new-wal", ".new-shm"] {
        fs::write(format!("{}{suffix}", path.display()), "half made").unwrap();
    }
    let file = try_open(&path).unwrap();
    insert(&file, 1).await.unwrap();
    file.close().await;
    assert_eq!(numbers(&path), [1]);
    assert_eq!(names_with_prefix(&folder, "sample.db.new"), <[String; 0]>::default());
}
