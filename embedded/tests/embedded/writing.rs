//! The thread that writes.

use std::future::poll_fn;
use std::os::unix::fs::FileExt as _;
use std::sync::mpsc;
use std::task::Poll;
use std::time::Duration;

use embedded::File;
use rusqlite::Connection;
use testbed::{Process, Scratch, eventually};
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::{FORMAT, INSERT, PATIENCE, insert, numbers, open, path_in};

#[tokio::test]
async fn concurrent_callers_share_commits_and_get_their_own_results() {
    let folder = Scratch::new("embedded");
    let file = File::open(&path_in(&folder), FORMAT).unwrap();
    let square = |n: i64| {
        file.transact(move |connection| {
            connection.execute(INSERT, [n])?;
            Ok(n * n)
        })
    };
    let answers = futures_util::future::join_all((0..3_000).map(square)).await;
    let answers: Vec<i64> = answers.into_iter().map(Result::unwrap).collect();
    assert_eq!(answers, (0..3_000).map(|n| n * n).collect::<Vec<_>>());
    assert_eq!(numbers(&path_in(&folder)).len(), 3_000);
}

/// The thread's hold on work that keeps it busy.
struct Hold {
    begun: oneshot::Receiver<()>,
    go_on: mpsc::Sender<()>,
}

/// Work that keeps the thread busy until it is told to go on: what is asked for once it has begun shares
/// the next commit.
fn held_up() -> (Hold, impl FnOnce(&Connection) -> rusqlite::Result<()> + Send) {
    let ((started, begun), (go_on, told)) = (oneshot::channel(), mpsc::channel());
    (Hold { begun, go_on }, move |_: &Connection| {
        let _ = started.send(());
        let _ = told.recv();
        Ok(())
    })
}

#[tokio::test]
async fn failed_request_is_rolled_back_without_the_rest_of_its_group() {
    let folder = Scratch::new("embedded");
    let file = File::open(&path_in(&folder), FORMAT).unwrap();
    let (hold, held_up) = held_up();
    let failing = file.transact(|connection| {
        connection.execute(INSERT, [2])?;
        connection.execute("INSERT INTO nowhere VALUES (1)", [])
    });
    let (_, (first, failed, last, ())) = tokio::join!(file.transact(held_up), async {
        hold.begun.await.unwrap();
        // They are asked for in this order, the last of them before the thread goes on.
        tokio::join!(insert(&file, 1), failing, insert(&file, 3), async {
            hold.go_on.send(()).unwrap();
        })
    });
    let error = failed.unwrap_err().to_string();
    assert!(error.contains("nowhere"), "{error}");
    first.unwrap();
    last.unwrap();
    assert_eq!(numbers(&path_in(&folder)), [1, 3]);
    assert_eq!(*file.status().borrow(), Ok(()), "the file can be written all the same");
}

#[tokio::test]
async fn full_disk_fails_the_group_until_space_is_free_again() {
    let folder = Scratch::new("embedded");
    let file = File::open(&path_in(&folder), FORMAT).unwrap();
    let limit = |pages: u32| {
        file.transact(move |connection| {
            let set = format!("PRAGMA max_page_count = {pages}");
            connection.query_row(&set, [], |row| row.get::<_, u32>(0))
        })
    };
    insert(&file, 1).await.unwrap();
    // To SQLite it is the same as a disk that is full.
    limit(1).await.unwrap();
    let large = "INSERT INTO number VALUES (2, hex(zeroblob(100000)))";
    let (hold, held_up) = held_up();
    let (_, (small, large, ())) = tokio::join!(file.transact(held_up), async {
        hold.begun.await.unwrap();
        let large = file.transact(move |connection| connection.execute(large, []));
        tokio::join!(insert(&file, 3), large, async { hold.go_on.send(()).unwrap() })
    });
    let error = large.unwrap_err().to_string();
    assert!(error.contains("full"), "{error}");
    small.unwrap_err();
    limit(1_000_000).await.unwrap();
    insert(&file, 4).await.unwrap();
    assert_eq!(numbers(&path_in(&folder)), [1, 4]);
}

#[tokio::test]
async fn panic_in_a_request_ends_the_thread_and_fails_all_callers() {
    let folder = Scratch::new("embedded");
    let file = File::open(&path_in(&folder), FORMAT).unwrap();
    insert(&file, 1).await.unwrap();
    let panicked = file.transact(|connection| -> rusqlite::Result<()> {
        connection.execute(INSERT, [2])?;
        panic!("on purpose")
    });
    panicked.await.unwrap_err();
    timeout(PATIENCE, file.died()).await.unwrap();
    insert(&file, 3).await.unwrap_err();
    // And the file is free again, with nothing of the work in it.
    let file = File::open(&path_in(&folder), FORMAT).unwrap();
    insert(&file, 4).await.unwrap();
    assert_eq!(numbers(&path_in(&folder)), [1, 4]);
}

#[tokio::test]
async fn abandoned_request_is_not_executed() {
    let folder = Scratch::new("embedded");
    let file = File::open(&path_in(&folder), FORMAT).unwrap();
    let (hold, held_up) = held_up();
    let (_, last) = tokio::join!(file.transact(held_up), async {
        hold.begun.await.unwrap();
        let mut given_up = Box::pin(insert(&file, 1));
        poll_fn(|context| Poll::Ready(given_up.as_mut().poll(context).is_pending())).await;
        drop(given_up);
        let go_on = async { hold.go_on.send(()).unwrap() };
        tokio::join!(insert(&file, 2), go_on).0
    });
    last.unwrap();
    assert_eq!(numbers(&path_in(&folder)), [2]);
}

#[tokio::test]
async fn status_reports_a_failed_write_and_the_recovery() {
    let folder = Scratch::new("embedded");
    let path = path_in(&folder);
    let file = File::open(&path, FORMAT).unwrap();
    let mut status = file.status();
    assert_eq!(*status.borrow_and_update(), Ok(()));
    // Held for longer than a writer waits for it.
    let other = embedded::attach(&path, FORMAT).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let error = insert(&file, 1).await.unwrap_err().to_string();
    assert!(error.contains("locked"), "{error}");
    let reason = status.borrow_and_update().clone().unwrap_err();
    assert!(reason.contains("locked"), "{reason}");
    other.execute_batch("ROLLBACK").unwrap();
    // Without anybody asking for anything.
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    insert(&file, 2).await.unwrap();
    assert_eq!(numbers(&path), [2]);
}

/// Busy callers must not keep it from trying.
#[tokio::test]
async fn busy_readers_do_not_delay_the_write_probe() {
    let folder = Scratch::new("embedded");
    let path = path_in(&folder);
    let file = File::open(&path, FORMAT).unwrap();
    let other = embedded::attach(&path, FORMAT).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    insert(&file, 1).await.unwrap_err();
    other.execute_batch("ROLLBACK").unwrap();
    eventually("it can be written again", PATIENCE, async || {
        let read = |connection: &Connection| connection.query_row("SELECT 1", [], |_| Ok(()));
        file.transact(read).await.unwrap();
        file.status().borrow().is_ok().then_some(())
    })
    .await;
}

/// Field case 3.6. SQLite goes on writing to files that have been removed, and all of that is gone with the
/// process: it must be noticed before a caller relies on it.
#[tokio::test]
async fn nothing_accepted_is_lost_when_a_file_in_use_is_removed() {
    for suffix in ["", "-wal", "-shm", ".lock"] {
        let folder = Scratch::new("embedded");
        let path = path_in(&folder);
        let file = File::open(&path, FORMAT).unwrap();
        insert(&file, 1).await.unwrap();
        std::fs::remove_file(format!("{}{suffix}", path.display())).unwrap();
        let mut accepted = vec![1];
        if insert(&file, 2).await.is_ok() {
            accepted.push(2);
        }
        // What a process leaves that is killed right after the answer.
        let left = Scratch::new("embedded");
        for entry in std::fs::read_dir(folder.path()).unwrap() {
            let entry = entry.unwrap();
            // The end of the thread removes the index.
            let _ = std::fs::copy(entry.path(), left.path().join(entry.file_name()));
        }
        timeout(PATIENCE, file.died()).await.unwrap();
        insert(&file, 3).await.unwrap_err();
        assert!(file.status().borrow().is_err(), "{suffix}");
        for path in [path, path_in(&left)] {
            let _file = open(&path).await;
            eventually("all that was accepted is there", PATIENCE, async || {
                (numbers(&path) == accepted).then_some(())
            })
            .await;
        }
    }
}

#[tokio::test]
async fn replaced_log_of_an_idle_file_is_detected() {
    let folder = Scratch::new("embedded");
    let path = path_in(&folder);
    let file = File::open(&path, FORMAT).unwrap();
    insert(&file, 1).await.unwrap();
    let log = format!("{}-wal", path.display());
    std::fs::remove_file(&log).unwrap();
    std::fs::write(&log, "another log").unwrap();
    timeout(PATIENCE, file.died()).await.unwrap();
    let _file = open(&path).await;
    assert_eq!(numbers(&path), [1]);
    let mut entries = std::fs::read_dir(folder.path()).unwrap();
    let is_foreign = |name: &str| name.contains("-wal.foreign-");
    assert!(entries.any(|entry| is_foreign(&entry.unwrap().file_name().to_string_lossy())));
}

/// Field case 2.7.
#[tokio::test]
async fn log_is_truncated_after_a_long_reader_has_finished() {
    let folder = Scratch::new("embedded");
    let path = path_in(&folder);
    let file = File::open(&path, FORMAT).unwrap();
    insert(&file, 1).await.unwrap();
    let reader = embedded::attach(&path, FORMAT).unwrap();
    reader.execute_batch("BEGIN; SELECT * FROM number").unwrap();
    let log = || std::fs::metadata(format!("{}-wal", path.display())).unwrap().len();
    while log() < 40 << 20 {
        let large_row = "INSERT INTO number (filler) VALUES (hex(zeroblob(2000000)))";
        file.transact(move |connection| connection.execute(large_row, [])).await.unwrap();
    }
    drop(reader);
    // Without another write.
    eventually("the log is cut back", PATIENCE, async || (log() <= 16 << 20).then_some(())).await;
}

/// Field case 3.2. The disk hangs for longer than a caller waits.
#[tokio::test]
async fn status_of_a_slow_file_is_an_error_until_a_write_is_fast() {
    let folder = Scratch::new("embedded");
    let path = path_in(&folder);
    let file = File::open(&path, FORMAT).unwrap();
    let other = embedded::attach(&path, FORMAT).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    timeout(Duration::from_millis(500), insert(&file, 1)).await.unwrap_err();
    assert!(file.status().borrow().is_err());
    other.execute_batch("ROLLBACK").unwrap();
    // Without anybody asking for anything.
    timeout(PATIENCE, file.status().wait_for(Result::is_ok)).await.unwrap().unwrap();
}

#[tokio::test]
async fn damage_found_during_use_ends_the_thread() {
    let folder = Scratch::new("embedded");
    let path = path_in(&folder);
    let file = File::open(&path, FORMAT).unwrap();
    let many = "WITH RECURSIVE n (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM n LIMIT 20000)
                INSERT INTO number SELECT n, hex(randomblob(50)) FROM n";
    file.transact(move |connection| connection.execute(many, [])).await.unwrap();
    file.close().await;
    let file = open(&path).await;
    let forget = |connection: &Connection| connection.execute_batch("PRAGMA shrink_memory");
    file.transact(forget).await.unwrap();
    // Behind its back, in all but the first pages.
    let length = std::fs::metadata(&path).unwrap().len();
    let garbage = vec![0xA5; usize::try_from(length).unwrap() - 16_384];
    let damaged = std::fs::File::options().write(true).open(&path).unwrap();
    damaged.write_all_at(&garbage, 16_384).unwrap();
    let read = |connection: &Connection| {
        connection.query_row("SELECT sum(length(filler)) FROM number", [], |_| Ok(()))
    };
    file.transact(read).await.unwrap_err();
    timeout(PATIENCE, file.died()).await.unwrap();
    // The next owner has a file that works.
    let file = open(&path).await;
    insert(&file, 30_000).await.unwrap();
}

#[tokio::test]
async fn commits_are_synced_by_a_sqlite_without_the_wal_reset_bug() {
    let folder = Scratch::new("embedded");
    let file = File::open(&path_in(&folder), FORMAT).unwrap();
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
    let folder = Scratch::new("embedded");
    let path = path_in(&folder);
    for _ in 0..5 {
        let sample = Process::spawn("embedded-sample", &[], &[path.to_str().unwrap()]);
        let answered = || {
            let line = sample.log().pop()?;
            line.strip_prefix("number=").map(|n| n.parse::<usize>().unwrap())
        };
        eventually("it has written some", PATIENCE, async || answered().filter(|n| *n > 50)).await;
        sample.kill();
        let answered = answered().unwrap();
        let file = open(&path).await;
        let written = numbers(&path);
        assert!(written.len() >= answered, "{} of {answered}", written.len());
        assert_eq!(written, (1..).take(written.len()).collect::<Vec<_>>());
        // The next one begins anew.
        file.transact(|connection| connection.execute("DELETE FROM number", [])).await.unwrap();
        file.close().await;
    }
}

#[tokio::test]
async fn removed_ballast_is_written_again() {
    let folder = Scratch::new("embedded");
    let path = path_in(&folder);
    let _file = File::open(&path, embedded::Format { ballast_bytes: 4_096, ..FORMAT }).unwrap();
    let ballast = path.with_extension("db.ballast");
    std::fs::remove_file(&ballast).unwrap();
    eventually("it is there again", PATIENCE, async || ballast.exists().then_some(())).await;
}
