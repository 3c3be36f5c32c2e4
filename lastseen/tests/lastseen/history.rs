use serde_json::Value;
use testkit::{Answer, Database, Partner, StatusApi, wait_for, wait_until};

use crate::Home;

/// The lines of JSON that a command prints.
async fn json(home: &Home, arguments: &[&str]) -> Vec<Value> {
    let (code, lines) = home.run(arguments).await;
    assert_eq!(code, Some(0), "{arguments:?}: {lines:?}");
    lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

fn texts<'a>(values: &'a [Value], field: &str) -> Vec<&'a str> {
    values.iter().filter_map(|value| value[field].as_str()).collect()
}

/// Two homes: with the table in a file, and in Postgres.
fn homes(status_api: &StatusApi, database: &Database) -> [Home; 2] {
    let endpoint = status_api.endpoint();
    let settings = [
        ("TESTER_ENDPOINT", endpoint.as_str()),
        ("OBJECT_TTL", "1s"),
        ("ROUTINE_INTERVAL", "50ms"),
    ];
    let in_postgres = [("DATABASE_URL", database.url())];
    [Home::new(&settings), Home::new(&[&settings[..], &in_postgres].concat())]
}

#[tokio::test]
async fn history_shows_sessions_after_the_object_is_gone() {
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let database = Database::new().await;
    for home in homes(&status_api, &database) {
        let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
        let partner = Partner::default();
        for session in 1..=2 {
            assert!(partner.post(&endpoint, &[42, -7]).await);
            wait_until("both objects are gone", async || {
                let changes = json(&home, &["changes", "--json"]).await;
                texts(&changes, "kind").iter().filter(|kind| **kind == "gone").count()
                    == 2 * session
            })
            .await;
        }
        let gone = json(&home, &["objects", "--gone", "--json"]).await;
        assert_eq!(texts(&gone, "id"), ["-7", "42"]);
        assert!(gone.iter().all(|object| object["gone_seconds"].as_f64() < Some(60.0)));
        let (_, lines) = home.run(&["objects", "--gone"]).await;
        assert!(lines[0].contains("gone for") && lines[1].contains("-7"), "{lines:?}");

        let [history] = &json(&home, &["history", "42", "--json"]).await[..] else { panic!() };
        let sessions = history["sessions"].as_array().unwrap();
        assert_eq!((history["id"].as_str(), sessions.len()), (Some("42"), 2));
        assert!(sessions.iter().all(|session| session["gone_at"].is_string()), "{history}");
        let online = history["seconds_online"].as_f64().unwrap();
        assert!(online > 0.0, "{history}");
        assert!((0.0..=1.0).contains(&history["ratio"].as_f64().unwrap()), "{history}");
        let (_, lines) = home.run(&["history", "-7", "--since", "1h"]).await;
        assert!(lines[0].starts_with("object -7 was online for "), "{lines:?}");
        assert!(lines[0].ends_with("in 2 sessions") && lines.len() == 4, "{lines:?}");
        let (code, lines) = home.run(&["history", "3"]).await;
        assert_eq!(code, Some(0));
        assert!(lines.concat().contains("object 3 was not online in the last 7d"), "{lines:?}");
        lastseen.stop().await;
    }
}

#[tokio::test]
async fn changes_continue_after_a_cursor_and_follow() {
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let database = Database::new().await;
    for home in homes(&status_api, &database) {
        let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
        let partner = Partner::default();
        let follower = home.spawn(&["changes", "--follow", "--json"]);
        assert!(partner.post(&endpoint, &[1]).await);
        follower.wait_for_log("\"kind\":\"gone\"").await;
        assert!(partner.post(&endpoint, &[2]).await);
        wait_until("the follower prints all changes", async || follower.log().len() >= 4).await;
        follower.terminate();
        assert_eq!(follower.wait().await.code(), Some(0));

        let all = json(&home, &["changes", "--json"]).await;
        let printed: Vec<Value> =
            follower.log().iter().filter_map(|line| serde_json::from_str(line).ok()).collect();
        assert_eq!(printed, all);
        assert_eq!(texts(&all, "kind"), ["online", "gone", "online", "gone"]);
        let second = all[1]["cursor"].as_str().unwrap();
        assert_eq!(json(&home, &["changes", "--json", "--after", second]).await, all[2..]);
        let reason = "does not have all changes after position 7;";
        home.assert_fails(&["changes", "--after", "7"], 70, reason).await;
        lastseen.stop().await;
    }
}

#[tokio::test]
async fn without_retention_there_is_no_history() {
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let endpoint = status_api.endpoint();
    let home = Home::new(&[("TESTER_ENDPOINT", &endpoint), ("HISTORY_RETENTION", "0")]);
    let (_lastseen, endpoint) = home.start(&["--no-tester"]).await;
    assert!(Partner::default().post(&endpoint, &[42]).await);
    wait_for("42 is online", async || (home.online().await == [42]).then_some(())).await;
    assert_eq!(json(&home, &["changes", "--json"]).await, [Value::Null; 0]);
    home.assert_fails(&["--history-retention=5m"], 78, "or 0 for no history").await;
}

#[tokio::test]
async fn changes_wait_for_a_transaction_that_may_commit_earlier_ones() {
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let database = Database::new().await;
    let [_, home] = homes(&status_api, &database);
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    assert!(Partner::default().post(&endpoint, &[1]).await);
    wait_until("the object is gone", async || {
        texts(&json(&home, &["changes", "--json"]).await, "kind").contains(&"gone")
    })
    .await;
    lastseen.stop().await;
    let mut open = database.pool().begin().await.unwrap();
    sqlx::query("SELECT pg_current_xact_id()").execute(&mut *open).await.unwrap();
    let command = home.spawn(&["changes", "--json"]);
    wait_until("the command has read which transactions are open", async || {
        let sessions = sqlx::query_scalar::<_, i64>(
            "SELECT count(*) FROM pg_stat_activity
             WHERE datname = current_database() AND pid <> pg_backend_pid()
               AND query LIKE '%pg_snapshot_xmin%'",
        );
        sessions.fetch_one(database.pool()).await.unwrap() > 0
    })
    .await;
    open.rollback().await.unwrap();
    assert_eq!(command.wait().await.code(), Some(0));
    assert_eq!(command.log().len(), 2, "{:?}", command.log());
}
