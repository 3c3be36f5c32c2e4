use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pipeline::Partner;
use testbed::{Answer, Process, Queue, StatusApi, eventually};

use crate::{Home, PATIENCE};

/// A status API that fails until it is told to be well, but for ids below zero, which are offline: if
/// it answered nobody, that would be nothing against a message.
struct Moody {
    api: StatusApi,
    well: Arc<AtomicBool>,
}

impl Moody {
    fn new() -> Self {
        let well = Arc::new(AtomicBool::new(false));
        let now = Arc::clone(&well);
        let api = StatusApi::start(move |id, _| match (now.load(Ordering::SeqCst), id % 2) {
            _ if id < 0 => Answer::Offline,
            (true, _) => Answer::Online,
            (false, 0) => Answer::Status(500),
            (false, _) => Answer::Status(503),
        });
        Self { api, well }
    }
}

/// Where the messages are: in a file, or on the shared RabbitMQ.
fn homes(status_api: &StatusApi, queue: &Queue) -> [Home; 2] {
    let endpoint = status_api.endpoint();
    let settings = [("TESTER_ENDPOINT", endpoint.as_str()), ("MAX_ATTEMPTS", "1")];
    let amqp_uri = testbed::amqp_uri();
    let on_rabbitmq = [("AMQP_URI", amqp_uri.as_str()), ("QUEUE_NAME", queue.name.as_str())];
    [Home::new(&settings), Home::new(&[settings, on_rabbitmq].concat())]
}

async fn found(home: &Home, arguments: &[&str], count: usize) -> Vec<String> {
    let (code, lines) = home.run(arguments).await;
    assert_eq!(code, Some(0), "{lines:?}");
    let last = lines.iter().find(|line| line.contains("dead letter")).unwrap();
    assert!(last.starts_with(&format!("{count} dead letter")), "{arguments:?}: {lines:?}");
    lines
}

/// Posts `ids` and waits until each is a dead letter.
async fn bury(home: &Home, lastseen: &Process, endpoint: &str, ids: &[i64]) {
    let settled = || lastseen.metric("lastseen_settled_total{disposition=\"dead_letter\"}");
    let before = settled().await;
    let partner = Partner::with_patience(PATIENCE);
    let mut others = (1..).map(|id: i64| -id);
    // With more failures among all lookups, they would be blamed on the API.
    for callback in ids.chunks(10) {
        let callback: Vec<i64> = others.by_ref().take(90).chain(callback.iter().copied()).collect();
        assert!(partner.post(endpoint, &callback).await, "{:?}", partner.ledger().refused);
    }
    eventually("all are dead letters", PATIENCE, async || {
        let callback: Vec<i64> = others.by_ref().take(10).collect();
        assert!(partner.post(endpoint, &callback).await, "{:?}", partner.ledger().refused);
        #[expect(clippy::cast_precision_loss, reason = "it is a small number")]
        (settled().await >= before + ids.len() as f64).then_some(())
    })
    .await;
    found(home, &["dead-letters", "list"], ids.len()).await;
}

#[tokio::test]
async fn dead_letters_are_listed_shown_redriven_and_purged_by_id_by_reason_and_all() {
    let (moody, queue) = (Moody::new(), Queue::new());
    for home in homes(&moody.api, &queue) {
        moody.well.store(false, Ordering::SeqCst);
        let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
        bury(&home, &lastseen, &endpoint, &[2, 3, 4, 5]).await;

        let lines = found(&home, &["dead-letters", "list", "--reason", "503"], 2).await.concat();
        assert!(lines.contains("503") && !lines.contains("500"), "{lines}");
        let lines = found(&home, &["dead-letters", "show", "--id", "4"], 1).await.join("\n");
        for part in ["object        4", "attempts      1", r#"{"id":4}"#, "answered 500"] {
            assert!(lines.contains(part), "{part} is missing in {lines}");
        }
        let lines = found(&home, &["dead-letters", "list", "--json"], 4).await;
        // The count, on standard error, may come first.
        let letters = lines.iter().filter_map(|line| serde_json::from_str(line).ok());
        let letters: Vec<serde_json::Value> = letters.collect();
        assert_eq!(letters.len(), 4, "{lines:?}");
        assert!(letters.iter().all(|letter| letter["attempts"] == 1), "{lines:?}");

        moody.well.store(true, Ordering::SeqCst);
        found(&home, &["dead-letters", "redrive", "--id=2", "--id=3", "--dry-run"], 2).await;
        found(&home, &["dead-letters", "list"], 4).await;
        found(&home, &["dead-letters", "redrive", "--id=2", "--id=3"], 2).await;
        eventually("what was redriven is online", PATIENCE, async || {
            (home.online().await == [2, 3]).then_some(())
        })
        .await;
        found(&home, &["dead-letters", "purge", "--reason=500", "--dry-run"], 1).await;
        found(&home, &["dead-letters", "purge", "--reason=500"], 1).await;
        let left = found(&home, &["dead-letters", "list"], 1).await.concat();
        assert!(left.contains("503"), "{left}");
        found(&home, &["dead-letters", "redrive", "--all"], 1).await;
        found(&home, &["dead-letters", "list"], 0).await;
        eventually("5 is online", PATIENCE, async || {
            (home.online().await == [2, 3, 5]).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn nothing_is_redriven_or_purged_without_saying_which() {
    let home = Home::new(&[]);
    for command in ["redrive", "purge"] {
        for (arguments, told) in [
            (&[][..], "name some by --id or --reason, or all of them by --all"),
            (&["--dry-run"], "name some by --id or --reason, or all of them by --all"),
            (&["--all", "--id=1"], "cannot be used with"),
            (&["--reason="], "expected a part of a reason"),
        ] {
            let (code, lines) = home.run(&[&["dead-letters", command], arguments].concat()).await;
            assert_eq!(code, Some(78), "{lines:?}");
            assert!(lines.concat().contains(told), "{lines:?}");
        }
    }
}

#[tokio::test]
async fn dead_letters_alone_is_a_settings_error_that_tells_what_could_follow() {
    let (code, lines) = Home::new(&[]).run(&["dead-letters"]).await;
    assert_eq!(code, Some(78), "{lines:?}");
    assert!(lines.concat().contains("list, show, redrive, purge"), "{lines:?}");
}

#[tokio::test]
async fn a_redrive_that_is_killed_midway_loses_none() {
    let (moody, queue) = (Moody::new(), Queue::new());
    let ids: Vec<i64> = (0..1_000).collect();
    for home in homes(&moody.api, &queue) {
        moody.well.store(false, Ordering::SeqCst);
        let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
        bury(&home, &lastseen, &endpoint, &ids).await;
        moody.well.store(true, Ordering::SeqCst);

        let redrive = home.spawn(&["dead-letters", "redrive", "--all"]);
        // It prints each when it is done.
        let some = async || (redrive.log().len() > 100).then_some(());
        eventually("some are redriven", PATIENCE, some).await;
        redrive.kill();
        redrive.wait().await;
        let (code, lines) = home.run(&["dead-letters", "redrive", "--all"]).await;
        assert_eq!(code, Some(0), "{lines:?}");
        eventually("all of them are online", PATIENCE, async || {
            (home.online().await == ids).then_some(())
        })
        .await;
    }
}

/// The test holds the file's write lock, so that the redrive cannot get far.
#[tokio::test]
async fn a_redrive_ends_at_a_signal_and_says_how_far_it_has_come() {
    let moody = Moody::new();
    let home = Home::new(&[("TESTER_ENDPOINT", &moody.api.endpoint()), ("MAX_ATTEMPTS", "1")]);
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    bury(&home, &lastseen, &endpoint, &[2, 3]).await;
    lastseen.terminate();
    lastseen.wait().await;
    let queue = home.file("queue.db").canonicalize().unwrap();
    let writer = rusqlite::Connection::open(&queue).unwrap();
    writer.execute_batch("BEGIN IMMEDIATE").unwrap();

    let redrive = home.spawn(&["dead-letters", "redrive", "--all"]);
    let open_files = format!("/proc/{}/fd", redrive.pid());
    eventually("it has opened the file's log", PATIENCE, async || {
        let files = std::fs::read_dir(&open_files).unwrap();
        let mut names = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
        names.any(|name| name == queue.with_extension("db-wal")).then_some(())
    })
    .await;
    redrive.terminate();
    let (code, lines) = (redrive.wait().await.code(), redrive.log());
    assert_eq!(code, Some(70), "{lines:?}");
    assert!(lines.concat().contains("0 dead letters redriven"), "{lines:?}");
    assert!(lines.concat().contains("ended early, after 0: stopped by a signal"), "{lines:?}");
    drop(writer);
    found(&home, &["dead-letters", "list"], 2).await;
}

/// A server that takes connections and never says a word.
#[tokio::test]
async fn a_command_that_waits_for_a_server_ends_at_a_signal() {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr().unwrap();
    let home = Home::new(&[
        ("AMQP_URI", &format!("amqp://{address}")),
        ("DATABASE_URL", &format!("postgres://{address}/postgres")),
    ]);
    for command in [&["objects"][..], &["dead-letters", "list"]] {
        let waiting = home.spawn(command);
        let _connection = server.accept().await.unwrap();
        waiting.terminate();
        let (code, lines) = (waiting.wait().await.code(), waiting.log());
        assert_eq!(code, Some(70), "{lines:?}");
        assert!(lines.concat().contains("stopped by a signal"), "{lines:?}");
    }
}

#[tokio::test]
async fn what_is_not_there_is_told_and_not_made() {
    let home = Home::new(&[]);
    for command in [&["objects"][..], &["dead-letters", "list"]] {
        let (code, lines) = home.run(command).await;
        assert_eq!(code, Some(70), "{lines:?}");
        assert!(lines.concat().contains("there is no "), "{lines:?}");
    }
    assert!(!home.file("").exists());
}

#[tokio::test]
async fn a_table_is_printed_for_people_and_nobody_online_is_told() {
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let home = Home::beside(&status_api);
    let (_lastseen, endpoint) = home.start(&["--no-tester"]).await;
    let (code, lines) = home.run(&["objects"]).await;
    let said = "nobody is online: no object was seen within OBJECT_TTL=1h";
    assert_eq!((code, lines.concat().as_str()), (Some(0), said));
    assert!(Partner::default().post(&endpoint, &[42]).await);
    eventually("42 is online", PATIENCE, async || (home.online().await == [42]).then_some(()))
        .await;
    let (_, lines) = home.run(&["objects"]).await;
    assert!(lines[0].contains("last seen") && lines[1].contains("42"), "{lines:?}");
}

#[tokio::test]
async fn a_row_that_is_stale_is_not_listed_even_if_nobody_deletes_it() {
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let home = Home::beside(&status_api);
    let (_lastseen, endpoint) = home.start(&["--no-tester", "--no-routine"]).await;
    assert!(Partner::default().post(&endpoint, &[42]).await);
    eventually("42 is online", PATIENCE, async || (home.online().await == [42]).then_some(()))
        .await;
    eventually("42 is stale", PATIENCE, async || {
        let (code, lines) = home.run(&["--object-ttl=1s", "objects"]).await;
        (code == Some(0) && lines.concat().ends_with("OBJECT_TTL=1s")).then_some(())
    })
    .await;
    assert_eq!(home.online().await, [42]);
}
