use testkit::{Answer, Partner, Process, Queue, StatusApi, wait_for, wait_until};

use crate::{Home, PATIENCE, groups};

/// Fails the lookups of all ids except for negative ones. These are answered, because failures of
/// an API that answers no lookup at all do not count against a message.
fn failing(id: i64, _: u32) -> Answer {
    match id % 2 {
        _ if id < 0 => Answer::Offline,
        0 => Answer::Status(500),
        _ => Answer::Status(503),
    }
}

fn healthy(id: i64, _: u32) -> Answer {
    if id < 0 { Answer::Offline } else { Answer::Online }
}

/// Two homes: with the queue in a file, and on the shared RabbitMQ.
fn homes(status_api: &StatusApi, queue: &Queue) -> [Home; 2] {
    let endpoint = status_api.endpoint();
    let settings = [("TESTER_ENDPOINT", endpoint.as_str()), ("MAX_ATTEMPTS", "1")];
    let amqp_uri = testkit::amqp_uri();
    let on_rabbitmq = [("AMQP_URI", amqp_uri.as_str()), ("QUEUE_NAME", queue.name.as_str())];
    [Home::new(&settings), Home::new(&[settings, on_rabbitmq].concat())]
}

/// Runs a command of `dead-letters`, which must report this number of dead letters.
async fn run_counting(home: &Home, arguments: &[&str], count: usize) -> Vec<String> {
    let (code, lines) = home.run(arguments).await;
    assert_eq!(code, Some(0), "{lines:?}");
    let last = lines.iter().find(|line| line.contains("dead letter")).unwrap();
    assert!(last.starts_with(&format!("{count} dead letter")), "{arguments:?}: {lines:?}");
    lines
}

/// Posts `ids` and waits until each is a dead letter.
async fn make_dead_letters(home: &Home, lastseen: &Process, endpoint: &str, ids: &[i64]) {
    let settled = || lastseen.metric("lastseen_settled_total{disposition=\"dead_letter\"}");
    let before = settled().await;
    let partner = Partner::with_timeout(PATIENCE);
    let mut answered_ids = (1..).map(|id: i64| -id);
    // Only a tenth of all lookups fail. With a larger share, the failures would count against the
    // API and not against the messages.
    for callback in ids.chunks(10) {
        let callback: Vec<i64> =
            answered_ids.by_ref().take(90).chain(callback.iter().copied()).collect();
        assert!(partner.post(endpoint, &callback).await, "{:?}", partner.ledger().refused);
    }
    wait_until("all are dead letters", async || {
        let callback: Vec<i64> = answered_ids.by_ref().take(10).collect();
        assert!(partner.post(endpoint, &callback).await, "{:?}", partner.ledger().refused);
        #[expect(clippy::cast_precision_loss, reason = "it is a small number")]
        (settled().await >= before + ids.len() as f64)
    })
    .await;
    run_counting(home, &["dead-letters", "list"], ids.len()).await;
}

#[tokio::test]
async fn dead_letter_commands_select_by_id_reason_and_all() {
    let (status_api, queue) = (StatusApi::start(failing), Queue::new());
    for home in homes(&status_api, &queue) {
        status_api.set_behaviour(failing);
        let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
        make_dead_letters(&home, &lastseen, &endpoint, &[2, 3, 4, 5]).await;

        let lines =
            run_counting(&home, &["dead-letters", "list", "--reason", "503"], 2).await.concat();
        assert!(lines.contains("503") && !lines.contains("500"), "{lines}");
        let lines = run_counting(&home, &["dead-letters", "show", "--id", "4"], 1).await.join("\n");
        for part in ["object        4", "attempts      1", r#"{"id":4}"#, "answered 500"] {
            assert!(lines.contains(part), "{part} is missing in {lines}");
        }
        let lines = run_counting(&home, &["dead-letters", "list", "--json"], 4).await;
        // The count on standard error may come first.
        let letters = lines.iter().filter_map(|line| serde_json::from_str(line).ok());
        let letters: Vec<serde_json::Value> = letters.collect();
        assert_eq!(letters.len(), 4, "{lines:?}");
        assert!(letters.iter().all(|letter| letter["attempts"] == 1), "{lines:?}");

        status_api.set_behaviour(healthy);
        run_counting(&home, &["dead-letters", "redrive", "--id=2", "--id=3", "--dry-run"], 2).await;
        run_counting(&home, &["dead-letters", "list"], 4).await;
        run_counting(&home, &["dead-letters", "redrive", "--id=2", "--id=3"], 2).await;
        wait_until("the redriven objects are online", async || home.online().await == [2, 3]).await;
        run_counting(&home, &["dead-letters", "purge", "--reason=500", "--dry-run"], 1).await;
        run_counting(&home, &["dead-letters", "purge", "--reason=500"], 1).await;
        let left = run_counting(&home, &["dead-letters", "list"], 1).await.concat();
        assert!(left.contains("503"), "{left}");
        run_counting(&home, &["dead-letters", "redrive", "--all"], 1).await;
        run_counting(&home, &["dead-letters", "list"], 0).await;
        wait_until("5 is online", async || home.online().await == [2, 3, 5]).await;
    }
}

#[tokio::test]
async fn redrive_and_purge_require_a_selection() {
    let home = Home::new(&[]);
    for command in ["redrive", "purge"] {
        for (arguments, error) in [
            (&[][..], "select dead letters with --id or --reason, or all with --all"),
            (&["--dry-run"], "select dead letters with --id or --reason, or all with --all"),
            (&["--all", "--id=1"], "cannot be used with"),
            (&["--reason="], "expected text that the reason contains"),
        ] {
            home.assert_fails(&[&["dead-letters", command], arguments].concat(), 78, error).await;
        }
    }
}

#[tokio::test]
async fn dead_letters_alone_is_a_settings_error() {
    Home::new(&[]).assert_fails(&["dead-letters"], 78, "list, show, redrive, purge").await;
}

#[tokio::test]
async fn killed_redrive_loses_no_dead_letter() {
    let (status_api, queue) = (StatusApi::start(failing), Queue::new());
    let ids: Vec<i64> = (0..1_000).collect();
    for home in homes(&status_api, &queue) {
        status_api.set_behaviour(failing);
        let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
        make_dead_letters(&home, &lastseen, &endpoint, &ids).await;
        status_api.set_behaviour(healthy);

        let redrive = home.spawn(&["dead-letters", "redrive", "--all"]);
        // The command prints each dead letter after redriving it.
        let some = async || (redrive.log().len() > 100).then_some(());
        wait_for("some are redriven", some).await;
        redrive.kill();
        redrive.wait().await;
        let (code, lines) = home.run(&["dead-letters", "redrive", "--all"]).await;
        assert_eq!(code, Some(0), "{lines:?}");
        wait_until("all of them are online", async || home.online().await == ids).await;
    }
}

/// The test holds the file's write lock, so that the redrive cannot finish.
#[tokio::test]
async fn redrive_ends_at_a_signal_and_reports_its_progress() {
    let status_api = StatusApi::start(failing);
    let home = Home::new(&[("TESTER_ENDPOINT", &status_api.endpoint()), ("MAX_ATTEMPTS", "1")]);
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    make_dead_letters(&home, &lastseen, &endpoint, &[2, 3]).await;
    lastseen.stop().await;
    let queue = home.file("queue.db").canonicalize().unwrap();
    let writer = rusqlite::Connection::open(&queue).unwrap();
    writer.execute_batch("BEGIN IMMEDIATE").unwrap();

    let redrive = home.spawn(&["dead-letters", "redrive", "--all"]);
    let open_files = format!("/proc/{}/fd", redrive.pid());
    wait_for("the redrive has opened the file's log", async || {
        let files = std::fs::read_dir(&open_files).unwrap();
        let mut names = files.filter_map(|file| std::fs::read_link(file.ok()?.path()).ok());
        names.any(|name| name == queue.with_extension("db-wal")).then_some(())
    })
    .await;
    redrive.terminate();
    let (code, lines) = (redrive.wait().await.code(), redrive.log());
    assert_eq!(code, Some(70), "{lines:?}");
    assert!(lines.concat().contains("0 dead letters redriven"), "{lines:?}");
    assert!(
        lines.concat().contains("stopped early, after 0 dead letters: stopped by a signal"),
        "{lines:?}"
    );
    drop(writer);
    run_counting(&home, &["dead-letters", "list"], 2).await;
}

/// The server accepts connections and never sends anything.
#[tokio::test]
async fn command_that_waits_for_a_server_ends_at_a_signal() {
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = server.local_addr().unwrap();
    let mut home = Home::new(&[
        ("AMQP_URI", &format!("amqp://{address}")),
        ("DATABASE_URL", &format!("postgres://{address}/postgres")),
    ]);
    groups::define(&mut home, "[]");
    let on_postgres = [&["objects"][..], &["history", "1"], &["changes"], &["groups"]];
    for command in on_postgres.into_iter().chain([&["dead-letters", "list"][..]]) {
        let waiting = home.spawn(command);
        let _connection = server.accept().await.unwrap();
        waiting.terminate();
        let (code, lines) = (waiting.wait().await.code(), waiting.log());
        assert_eq!(code, Some(70), "{lines:?}");
        assert!(lines.concat().contains("stopped by a signal"), "{lines:?}");
    }
}

#[tokio::test]
async fn missing_files_are_reported_and_not_created() {
    let home = Home::new(&[]);
    for command in [&["objects"][..], &["history", "1"], &["changes"], &["dead-letters", "list"]] {
        home.assert_fails(command, 70, "there is no ").await;
    }
    assert!(!home.file("").exists());
}

#[tokio::test]
async fn objects_prints_a_table_or_that_no_object_is_online() {
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let home = Home::with_status_api(&status_api);
    let (_lastseen, endpoint) = home.start(&["--no-tester"]).await;
    let (code, lines) = home.run(&["objects"]).await;
    let expected = "no object is online: none was seen within OBJECT_TTL=1h";
    assert_eq!((code, lines.concat().as_str()), (Some(0), expected));
    assert!(Partner::default().post(&endpoint, &[42]).await);
    wait_until("42 is online", async || home.online().await == [42]).await;
    let (_, lines) = home.run(&["objects"]).await;
    assert!(lines[0].contains("last seen") && lines[1].contains("42"), "{lines:?}");
}

#[tokio::test]
async fn stale_row_is_not_listed_even_if_not_deleted() {
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let home = Home::with_status_api(&status_api);
    let (_lastseen, endpoint) = home.start(&["--no-tester", "--no-routine"]).await;
    assert!(Partner::default().post(&endpoint, &[42]).await);
    wait_until("42 is online", async || home.online().await == [42]).await;
    wait_until("42 is stale", async || {
        let (code, lines) = home.run(&["--object-ttl=1s", "objects"]).await;
        code == Some(0) && lines.concat().ends_with("OBJECT_TTL=1s")
    })
    .await;
    assert_eq!(home.online().await, [42]);
}
