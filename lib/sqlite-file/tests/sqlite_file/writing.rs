//! The writing thread.

use std::future::poll_fn;
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc;
use std::task::Poll;
use std::time::Duration;

use runtime::Supervisor;
use rusqlite::Connection;
use sqlite_file::{File, Format};
use testkit::{Process, Scratch, wait_for, wait_until};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::{
    FORMAT, INSERT, PATIENCE, insert, numbers, open, path_in, sample, try_open, unused_path,
};

#[tokio::test]
async fn concurrent_callers_share_commits_and_get_their_own_results() {
    let (_folder, path, file) = sample();
    let square = |n: i64| {
        file.transact(move |connection| {
            connection.execute(INSERT, [n])?;
            Ok(n * n)
        })
    };
    let answers = futures_util::future::join_all((0..3_000).map(square)).await;
    let answers: Vec<i64> = answers.into_iter().map(Result::unwrap).collect();
    assert_eq!(answers, (0..3_000).map(|n| n * n).collect::<Vec<_>>());
    assert_eq!(numbers(&path).len(), 3_000);
}

/// Controls a request that blocks the writing thread.
struct BlockedThread {
    blocked: oneshot::Receiver<()>,
    unblock: mpsc::Sender<()>,
}

/// A request that blocks the writing thread until it is unblocked. All requests that are submitted
/// meanwhile share the next commit.
fn blocking_request() -> (BlockedThread, impl FnOnce(&Connection) -> rusqlite::Result<()> + Send) {
    let ((started, blocked), (unblock, unblocked)) = (oneshot::channel(), mpsc::channel());
    (BlockedThread { blocked, unblock }, move |_: &Connection| {
        let _ = started.send(());
        let _ = unblocked.recv();
        Ok(())
    })
}

#[tokio::test]
async fn failed_request_is_rolled_back_without_the_rest_of_its_group() {
    let (_folder, path, file) = sample();
    let (thread, blocking) = blocking_request();
    let failing = file.transact(|connection| {
        connection.execute(INSERT, [2])?;
        connection.execute("INSERT INTO nowhere VALUES (1)", [])
    });
    let (_, (first, failed, last, ())) = tokio::join!(file.transact(blocking), async {
        thread.blocked.await.unwrap();
        // The three requests are submitted in this order, before the thread is unblocked.
        tokio::join!(insert(&file, 1), failing, insert(&file, 3), async {
            thread.unblock.send(()).unwrap();
        })
    });
    let error = failed.unwrap_err().to_string();
    assert!(error.contains("nowhere"), "{error}");
    first.unwrap();
    last.unwrap();
    assert_eq!(numbers(&path), [1, 3]);
    assert_eq!(*file.status().borrow(), Ok(()), "the file can still be written");
}

#[tokio::test]
async fn full_disk_fails_the_group_until_space_is_free_again() {
    let (_folder, path, file) = sample();
    let limit = |pages: u32| {
        file.transact(move |connection| {
            let set = format!("PRAGMA max_page_count = {pages}");
            connection.query_row(&set, [], |row| row.get::<_, u32>(0))
        })
    };
    insert(&file, 1).await.unwrap();
    // SQLite handles this limit like a full disk. It raises the limit to the size of the file.
    limit(1).await.unwrap();
    let large = "INSERT INTO number VALUES (2, hex(zeroblob(100000)))";
    let (thread, blocking) = blocking_request();
    let (_, (small, large, ())) = tokio::join!(file.transact(blocking), async {
        thread.blocked.await.unwrap();
        let large = file.transact(move |connection| connection.execute(large, []));
        tokio::join!(insert(&file, 3), large, async { thread.unblock.send(()).unwrap() })
    });
    let error = large.unwrap_err().to_string();
    assert!(error.contains("full"), "{error}");
    small.unwrap_err();
    limit(1_000_000).await.unwrap();
    insert(&file, 4).await.unwrap();
    assert_eq!(numbers(&path), [1, 4]);
}

#[tokio::test]
async fn panic_in_a_request_ends_the_thread_and_fails_all_callers() {
    let (_folder, path) = unused_path();
    let supervisor = Supervisor::default();
    let file = File::open(&path, FORMAT, &supervisor).unwrap();
    insert(&file, 1).await.unwrap();
    let panicked = file.transact(|connection| -> rusqlite::Result<()> {
        connection.execute(INSERT, [2])?;
        panic!("on purpose")
    });
    panicked.await.unwrap_err();
    timeout(PATIENCE, file.ended()).await.unwrap();
    assert_eq!(timeout(PATIENCE, supervisor.failure()).await.unwrap(), "sample writer");
    insert(&file, 3).await.unwrap_err();
    // The file is unlocked, and contains nothing of the request that panicked.
    let file = try_open(&path).unwrap();
    insert(&file, 4).await.unwrap();
    assert_eq!(numbers(&path), [1, 4]);
}

#[tokio::test]
async fn abandoned_request_is_not_executed() {
    let (_folder, path, file) = sample();
    let (thread, blocking) = blocking_request();
    let (_, last) = tokio::join!(file.transact(blocking), async {
        thread.blocked.await.unwrap();
        let mut given_up = Box::pin(insert(&file, 1));
        poll_fn(|context| Poll::Ready(given_up.as_mut().poll(context).is_pending())).await;
        drop(given_up);
        let unblock = async { thread.unblock.send(()).unwrap() };
        tokio::join!(insert(&file, 2), unblock).0
    });
    last.unwrap();
    assert_eq!(numbers(&path), [2]);
}

#[tokio::test]
async fn status_reports_a_failed_write_and_the_recovery() {
    let (_folder, path, file) = sample();
    let mut status = file.status();
    assert_eq!(*status.borrow_and_update(), Ok(()));
    // This transaction stays open for longer than the writing thread waits for it.
    let other = sqlite_file::attach(&path, FORMAT).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = insert(&file, 1).await.unwrap_err().to_string();
    assert!(error.contains("locked"), "{error}");
    let reason = status.borrow_and_update().clone().unwrap_err();
    assert!(reason.contains("locked"), "{reason}");
    other.execute_batch("ROLLBACK").unwrap();
    // The status recovers although no request is submitted.
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    insert(&file, 2).await.unwrap();
    assert_eq!(numbers(&path), [2]);
}

/// The thread must also probe the file while it is busy with requests.
#[tokio::test]
async fn busy_readers_do_not_delay_the_write_probe() {
    let (_folder, path, file) = sample();
    let other = sqlite_file::attach(&path, FORMAT).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    insert(&file, 1).await.unwrap_err();
    other.execute_batch("ROLLBACK").unwrap();
    wait_until("it can be written again", async || {
        let read = |connection: &Connection| connection.query_row("SELECT 1", [], |_| Ok(()));
        file.transact(read).await.unwrap();
        file.status().borrow().is_ok()
    })
    .await;
}

/// Field case 3.6. SQLite keeps writing to removed files, and these writes are lost when the
/// process ends. The removal must be detected before a caller relies on a write.
#[tokio::test]
async fn nothing_accepted_is_lost_when_a_file_in_use_is_removed() {
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let folder = Scratch::new("sqlite-file");
        let path = path_in(&folder);
        let file = try_open(&path).unwrap();
        insert(&file, 1).await.unwrap();
        std::fs::remove_file(format!("{}{suffix}", path.display())).unwrap();
        let mut accepted = vec![1];
        if insert(&file, 2).await.is_ok() {
            accepted.push(2);
        }
        // Copy the files as a process leaves them that is killed right after the answer.
        let left = Scratch::new("sqlite-file");
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            let entry = entry.unwrap();
            // Copying may fail, because the thread removes the index when it ends.
            let _ = std::fs::copy(entry.path(), left.path().join(entry.file_name()));
        }
        timeout(PATIENCE, file.ended()).await.unwrap();
        insert(&file, 3).await.unwrap_err();
        assert!(file.status().borrow().is_err(), "{suffix}");
        for path in [path, path_in(&left)] {
            let _file = open(&path).await;
            wait_until("the file contains all accepted numbers", async || {
                numbers(&path) == accepted
            })
            .await;
        }
    }
}

#[tokio::test]
async fn replaced_log_of_an_idle_file_is_detected() {
    let (folder, path, file) = sample();
    insert(&file, 1).await.unwrap();
    let log = format!("{}-wal", path.display());
    std::fs::remove_file(&log).unwrap();
    std::fs::write(&log, "another log").unwrap();
    timeout(PATIENCE, file.ended()).await.unwrap();
    let _file = open(&path).await;
    assert_eq!(numbers(&path), [1]);
    let mut entries = std::fs::read_dir(folder.path()).unwrap();
    let is_foreign = |name: &str| name.contains("-wal.foreign-");
    assert!(entries.any(|entry| is_foreign(&entry.unwrap().file_name().to_string_lossy())));
}

/// Field case 2.7.
#[tokio::test]
async fn log_is_truncated_after_a_long_reader_has_finished() {
    let (_folder, path, file) = sample();
    insert(&file, 1).await.unwrap();
    let reader = sqlite_file::attach(&path, FORMAT).unwrap();
    reader.execute_batch("BEGIN; SELECT * FROM number").unwrap();
    let log = || std::fs::metadata(format!("{}-wal", path.display())).unwrap().len();
    while log() < 40 << 20 {
        let large_row = "INSERT INTO number (filler) VALUES (hex(zeroblob(2000000)))";
        file.transact(move |connection| connection.execute(large_row, [])).await.unwrap();
    }
    drop(reader);
    // The log is truncated although nothing is written any more.
    wait_until("the log is truncated", async || log() <= 16 << 20).await;
}

/// Field case 3.2. The disk hangs for longer than a caller waits.
#[tokio::test]
async fn status_of_a_slow_file_is_an_error_until_a_write_is_fast() {
    let (_folder, path, file) = sample();
    let other = sqlite_file::attach(&path, FORMAT).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    timeout(Duration::from_millis(500), insert(&file, 1)).await.unwrap_err();
    assert!(file.status().borrow().is_err());
    other.execute_batch("ROLLBACK").unwrap();
    // The status recovers although no request is submitted.
    timeout(PATIENCE, file.status().wait_for(Result::is_ok)).await.unwrap().unwrap();
}

#[tokio::test]
async fn damage_found_during_use_ends_the_thread() {
    let (_folder, path, file) = sample();
    let many = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT 20000)
                INSERT INTO number SELECT n, hex(randomblob(50)) FROM n";
    file.transact(move |connection| connection.execute(many, [])).await.unwrap();
    file.close().await;
    let file = open(&path).await;
    // SQLite must read the damaged pages from the file, not from its cache.
    let drop_cache = |connection: &Connection| connection.execute_batch("PRAGMA shrink_memory");
    file.transact(drop_cache).await.unwrap();
    // Overwrite all but the first four pages.
    let length = std::fs::metadata(&path).unwrap().len();
    let garbage = vec![0xA5; usize::try_from(length).unwrap() - 16_384];
    let damaged = std::fs::File::options().write(true).open(&path).unwrap();
    damaged.write_all_at(&garbage, 16_384).unwrap();
    let read = |connection: &Connection| {
        connection.query_row("SELECT sum(length(filler)) FROM number", [], |_| Ok(()))
    };
    file.transact(read).await.unwrap_err();
    timeout(PATIENCE, file.ended()).await.unwrap();
    // The next owner gets a working file.
    let file = open(&path).await;
    insert(&file, 30_000).await.unwrap();
}

#[tokio::test]
async fn commits_are_synced_by_a_sqlite_without_the_wal_reset_bug() {
    let (_folder, _path, file) = sample();
    let settings = file.transact(|connection| {
        let number = |pragma| connection.pragma_query_value(None, pragma, |row| row.get(0));
        let mode = connection.pragma_query_value(None, "journal_mode", |row| row.get(0));
        Ok((number("synchronous")?, mode?))
    });
    let (synchronous, mode): (u32, String) = settings.await.unwrap();
    assert_eq!((synchronous, mode.as_str()), (2, "wal"));
    assert!(rusqlite::version_number() >= 3_051_003, "{}", rusqlite::version());
}

#[tokio::test]
async fn acknowledged_writes_survive_a_kill_at_any_moment() {
    let (_folder, path) = unused_path();
    for _ in 0..5 {
        let sample = Process::spawn("sqlite-file-sample", &[], &[path.to_str().unwrap()]);
        let acknowledged = || {
            let line = sample.log().pop()?;
            line.strip_prefix("number=").map(|n| n.parse::<usize>().unwrap())
        };
        let enough = async || acknowledged().filter(|n| *n > 50);
        wait_for("the sample has written 50 numbers", enough).await;
        sample.kill();
        let acknowledged = acknowledged().unwrap();
        let file = open(&path).await;
        let written = numbers(&path);
        assert!(written.len() >= acknowledged, "{} of {acknowledged}", written.len());
        assert_eq!(written, (1..).take(written.len()).collect::<Vec<_>>());
        // The next sample starts with an empty table.
        file.transact(|connection| connection.execute("DELETE FROM number", [])).await.unwrap();
        file.close().await;
    }
}

#[tokio::test]
async fn removed_ballast_is_written_again() {
    let (_folder, path) = unused_path();
    let with_ballast = Format { ballast_bytes: 4_096, ..FORMAT };
    let _file = File::open(&path, with_ballast, &Supervisor::default()).unwrap();
    let ballast = path.with_extension("db.ballast");
    std::fs::remove_file(&ballast).unwrap();
    wait_until("the ballast exists again", async || ballast.exists()).await;
}
