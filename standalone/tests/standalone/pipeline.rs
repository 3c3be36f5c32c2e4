use std::collections::HashSet;

use pipeline::{Partner, viewer_url};
use testbed::{Database, Queue, eventually, http_get};

use crate::{Home, MILLISECOND, PATIENCE, even_ids_online};

#[tokio::test]
async fn default_settings_fill_the_table() {
    let home = Home::new(&[("CALLBACK_INTERVAL", "500ms"), ("LATENCY_MAX", "400ms")]);
    let (lastseen, _) = home.start(&[]).await;
    eventually("most of the even ids are online", PATIENCE, async || {
        (home.online().await.len() >= 40).then_some(())
    })
    .await;
    assert!(home.online().await.iter().all(|id| id % 2 == 0 && (0..100).contains(id)));
    lastseen.terminate();
    assert_eq!(lastseen.wait().await.code(), Some(0));
}

#[tokio::test]
async fn with_a_secret_unsigned_callbacks_are_rejected() {
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let home = Home::new(&[("CALLBACK_SECRET", secret), ("CALLBACK_INTERVAL", "100ms")]);
    let (lastseen, endpoint) = home.start(&[]).await;
    eventually("the partner's callbacks are accepted", PATIENCE, async || {
        let name = "lastseen_callbacks_total{outcome=\"accepted\"}";
        (lastseen.metric(name).await >= 3.0).then_some(())
    })
    .await;
    let partner = Partner::default();
    assert!(!partner.post(&endpoint, &[2]).await);
    assert!(partner.ledger().refused[0].starts_with("401 Unauthorized"), "{:?}", partner.ledger());
}

#[tokio::test]
async fn object_comes_online_and_is_deleted_when_stale() {
    let home = Home::new(&[("OBJECT_TTL", "8s"), ("ROUTINE_INTERVAL", "200ms")]);
    let (lastseen, endpoint) = home.start(&["--no-partner"]).await;
    assert!(Partner::default().post(&endpoint, &[2, 4, 7]).await);
    eventually("2 and 4 are online", PATIENCE, async || {
        (home.online().await == [2, 4]).then_some(())
    })
    .await;
    eventually("no object is online", PATIENCE, async || {
        home.online().await.is_empty().then_some(())
    })
    .await;
    eventually("their rows are deleted", PATIENCE, async || {
        (lastseen.metric("lastseen_deleted_rows_total").await >= 2.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn viewer_shows_changes_at_once() {
    let home = Home::new(&[("OBJECT_TTL", "4s"), ("ROUTINE_INTERVAL", "200ms")]);
    let (lastseen, endpoint) = home.start(&["--no-partner"]).await;
    let address = viewer_url(&lastseen).await.trim_start_matches("http://").parse().unwrap();
    let shown = async || {
        let reply = http_get(address, "/objects").await.unwrap();
        let page: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
        let objects = page["objects"].as_array().unwrap();
        let id =
            |object: &serde_json::Value| object["id"].as_str().unwrap().parse::<i64>().unwrap();
        objects.iter().map(id).collect::<Vec<_>>()
    };
    assert!(Partner::default().post(&endpoint, &[2, 4, 7]).await);
    // Sooner than the viewer would read the table without an event.
    let soon = PATIENCE / 2;
    eventually("both are shown", soon, async || (shown().await == [2, 4]).then_some(())).await;
    eventually("no object is shown", soon, async || shown().await.is_empty().then_some(())).await;
    let stats = http_get(address, "/stats").await.unwrap().body;
    assert!(stats.contains(r#"{"url":"this process","status":"ok","settings":null}"#), "{stats}");
}

#[tokio::test]
async fn without_the_tester_lookups_go_to_tester_endpoint() {
    let status_api = even_ids_online(MILLISECOND);
    let home = Home::with_status_api(&status_api);
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    assert!(Partner::default().post(&endpoint, &[6, 9]).await);
    eventually("6 is online", PATIENCE, async || (home.online().await == [6]).then_some(())).await;
    assert!(lastseen.log().iter().all(|line| !line.contains("status API is listening")));
    let looked_up: HashSet<i64> = status_api.lookups().into_iter().map(|(id, _)| id).collect();
    assert_eq!(looked_up, HashSet::from([6, 9]));
}

#[tokio::test]
async fn work_of_an_omitted_role_waits() {
    let status_api = even_ids_online(MILLISECOND);
    let home = Home::with_status_api(&status_api);
    let (lastseen, endpoint) = home.start(&["--no-tester", "--no-consumer"]).await;
    assert!(Partner::default().post(&endpoint, &[2]).await);
    lastseen.terminate();
    assert_eq!(lastseen.wait().await.code(), Some(0));
    assert!(status_api.lookups().is_empty());

    let others = home.spawn(&["--no-tester", "--no-producer", "--no-routine"]);
    eventually("2 is online", PATIENCE, async || (home.online().await == [2]).then_some(())).await;
    assert!(others.log().iter().all(|line| !line.contains("accepting callbacks")));
}

#[tokio::test]
async fn leaving_out_every_role_is_a_settings_error() {
    let all = ["--no-producer", "--no-consumer", "--no-routine", "--no-viewer", "--no-tester"];
    let (code, lines) = Home::new(&[]).run(&all).await;
    assert_eq!(code, Some(78), "{lines:?}");
    assert!(
        lines.concat().contains("leave no role to run: remove one of these flags"),
        "{lines:?}"
    );
}

#[tokio::test]
async fn configured_status_api_is_never_replaced_silently() {
    let status_api = even_ids_online(MILLISECOND);
    let home = Home::with_status_api(&status_api);
    for arguments in [&[][..], &["--no-partner"]] {
        let (code, lines) = home.run(arguments).await;
        assert_eq!(code, Some(78), "{lines:?}");
        assert!(lines.concat().contains("add --no-tester or --no-api"), "{lines:?}");
    }
    home.start(&["--no-api", "--no-partner"]).await;
    // The default value, set explicitly, does not count as configured.
    let home = Home::new(&[("TESTER_ENDPOINT", "http://localhost:9010")]);
    home.start(&["--no-partner"]).await;
}

#[tokio::test]
async fn address_in_use_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (code, lines) = Home::new(&[("TESTER_ADDR", &address)]).run(&[]).await;
    assert_eq!(code, Some(70), "{lines:?}");
    let error = format!("cannot listen on TESTER_ADDR={address}");
    assert!(lines.concat().contains(&error), "{lines:?}");
}

#[tokio::test]
async fn urls_select_rabbitmq_and_postgres() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let status_api = even_ids_online(MILLISECOND);
    let home = Home::new(&[
        ("TESTER_ENDPOINT", &status_api.endpoint()),
        ("AMQP_URI", &testbed::amqp_uri()),
        ("QUEUE_NAME", &queue.name),
        ("DATABASE_URL", database.url()),
    ]);
    let (_lastseen, endpoint) = home.start(&["--no-tester"]).await;
    assert!(Partner::default().post(&endpoint, &[2, 3]).await);
    eventually("2 is online", PATIENCE, async || (home.online().await == [2]).then_some(())).await;
    assert_eq!(queue.depth(&queue.name).await, Some(0));
    let in_postgres: i64 = row_count(&database).await;
    assert_eq!(in_postgres, 1);
    assert!(!home.file("queue.db").exists() && !home.file("store.db").exists());
}

async fn row_count(database: &Database) -> i64 {
    sqlx::query_scalar("SELECT count(*) FROM object").fetch_one(database.pool()).await.unwrap()
}

#[tokio::test]
async fn stop_under_load_drains_and_keeps_the_rest() {
    let status_api = even_ids_online(MILLISECOND * 300);
    let home = Home::with_status_api(&status_api);
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    let partner = Partner::default();
    let load = partner.post_all(endpoint, 0..6_000, 20, MILLISECOND * 5);
    eventually("it is busy", PATIENCE, async || (status_api.in_flight() > 100).then_some(())).await;
    lastseen.terminate();
    assert_eq!(lastseen.wait().await.code(), Some(0), "it should drain");
    load.await.unwrap();
    let ledger = partner.ledger();
    assert!(ledger.refused.is_empty(), "{:?}", ledger.refused);
    assert!(ledger.accepted.len() > 200, "some were accepted before: {}", ledger.accepted.len());

    let _again = home.start(&["--no-tester"]).await;
    eventually("each accepted id is looked up", PATIENCE, async || {
        ledger.accepted.iter().all(|id| status_api.lookups_of(*id) > 0).then_some(())
    })
    .await;
    let twice = ledger.accepted.iter().filter(|id| status_api.lookups_of(**id) > 1).count();
    assert_eq!(twice, 0, "looked up twice because of a clean stop");
}
