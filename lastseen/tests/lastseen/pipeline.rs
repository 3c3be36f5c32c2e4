use std::collections::HashSet;

use serde_json::json;
use testkit::{
    Database, Partner, Queue, StatusApi, eventually, http_get, viewer_address, wait_for, wait_until,
};

use crate::{Home, MILLISECOND, PATIENCE};

#[tokio::test]
async fn default_settings_fill_the_table() {
    let home = Home::new(&[("CALLBACK_INTERVAL", "500ms"), ("LATENCY_MAX", "400ms")]);
    let (lastseen, _) = home.start(&[]).await;
    wait_until("most of the even ids are online", async || home.online().await.len() >= 40).await;
    assert!(home.online().await.iter().all(|id| id % 2 == 0 && (0..100).contains(id)));
    lastseen.stop().await;
}

#[tokio::test]
async fn with_a_secret_unsigned_callbacks_are_rejected() {
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let home = Home::new(&[("CALLBACK_SECRET", secret), ("CALLBACK_INTERVAL", "100ms")]);
    let (lastseen, endpoint) = home.start(&[]).await;
    let accepted = "lastseen_callbacks_total{outcome=\"accepted\"}";
    lastseen.wait_for_metric(accepted, 3.0).await;
    let partner = Partner::default();
    assert!(!partner.post(&endpoint, &[2]).await);
    assert!(partner.ledger().refused[0].starts_with("401 Unauthorized"), "{:?}", partner.ledger());
}

#[tokio::test]
async fn object_comes_online_and_is_deleted_when_stale() {
    let home = Home::new(&[("OBJECT_TTL", "8s"), ("ROUTINE_INTERVAL", "200ms")]);
    let (lastseen, endpoint) = home.start(&["--no-partner"]).await;
    assert!(Partner::default().post(&endpoint, &[2, 4, 7]).await);
    wait_until("2 and 4 are online", async || home.online().await == [2, 4]).await;
    wait_until("no object is online", async || home.online().await.is_empty()).await;
    lastseen.wait_for_metric("lastseen_deleted_rows_total", 2.0).await;
}

#[tokio::test]
async fn viewer_shows_what_is_online_and_the_local_metrics() {
    let home = Home::new(&[("OBJECT_TTL", "4s"), ("ROUTINE_INTERVAL", "200ms")]);
    let (lastseen, endpoint) = home.start(&["--no-partner"]).await;
    let address = viewer_address(&lastseen).await;
    let shown = async || {
        let reply = http_get(address, "/objects").await.unwrap();
        let page: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
        let objects = page["objects"].as_array().unwrap();
        let id =
            |object: &serde_json::Value| object["id"].as_str().unwrap().parse::<i64>().unwrap();
        objects.iter().map(id).collect::<Vec<_>>()
    };
    assert!(Partner::default().post(&endpoint, &[2, 4, 7]).await);
    let soon = PATIENCE / 2;
    eventually("both are shown", soon, async || (shown().await == [2, 4]).then_some(())).await;
    eventually("no object is shown", soon, async || shown().await.is_empty().then_some(())).await;
    // The rates need a second reading of the metrics.
    let stats = wait_for("the viewer has read its metrics twice", async || {
        let stats = http_get(address, "/stats").await.unwrap().body;
        let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
        stats["lookups_per_second"].is_number().then_some(stats)
    })
    .await;
    let this_process = json!([{"url": "this process", "status": "ok", "settings": null}]);
    assert_eq!(stats["services"], this_process);
    assert!(stats["lookups_in_flight"].is_number(), "{stats}");
    assert!(stats["lookups_by_outcome"]["online"].is_number(), "{stats}");
}

#[tokio::test]
async fn without_the_tester_lookups_go_to_tester_endpoint() {
    let (status_api, home) = Home::with_even_ids_online(MILLISECOND);
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    assert!(Partner::default().post(&endpoint, &[6, 9]).await);
    wait_until("6 is online", async || home.online().await == [6]).await;
    assert!(lastseen.log().iter().all(|line| !line.contains("status API is listening")));
    let looked_up: HashSet<i64> = status_api.lookups().into_iter().map(|(id, _)| id).collect();
    assert_eq!(looked_up, HashSet::from([6, 9]));
}

#[tokio::test]
async fn work_of_an_omitted_role_waits() {
    let (status_api, home) = Home::with_even_ids_online(MILLISECOND);
    let (lastseen, endpoint) = home.start(&["--no-tester", "--no-consumer"]).await;
    assert!(Partner::default().post(&endpoint, &[2]).await);
    lastseen.stop().await;
    assert!(status_api.lookups().is_empty());

    let others = home.spawn(&["--no-tester", "--no-producer", "--no-routine"]);
    wait_until("2 is online", async || home.online().await == [2]).await;
    assert!(others.log().iter().all(|line| !line.contains("accepting callbacks")));
}

#[tokio::test]
async fn leaving_out_every_role_is_a_settings_error() {
    let all = ["--no-producer", "--no-consumer", "--no-routine", "--no-viewer", "--no-tester"];
    let error = "leave no role to run: remove one of these flags";
    Home::new(&[]).assert_fails(&all, 78, error).await;
}

#[tokio::test]
async fn configured_status_api_is_never_replaced_silently() {
    let (_status_api, home) = Home::with_even_ids_online(MILLISECOND);
    for arguments in [&[][..], &["--no-partner"]] {
        home.assert_fails(arguments, 78, "add --no-tester or --no-api").await;
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
    let error = format!("cannot listen on TESTER_ADDR={address}");
    Home::new(&[("TESTER_ADDR", &address)]).assert_fails(&[], 70, &error).await;
}

#[tokio::test]
async fn urls_select_rabbitmq_and_postgres() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let status_api = StatusApi::even_ids_online(MILLISECOND);
    let home = Home::new(&[
        ("TESTER_ENDPOINT", &status_api.endpoint()),
        ("AMQP_URI", &testkit::amqp_uri()),
        ("QUEUE_NAME", &queue.name),
        ("DATABASE_URL", database.url()),
    ]);
    let (_lastseen, endpoint) = home.start(&["--no-tester"]).await;
    assert!(Partner::default().post(&endpoint, &[2, 3]).await);
    wait_until("2 is online", async || home.online().await == [2]).await;
    assert_eq!(queue.depth(&queue.name).await, Some(0));
    let count = sqlx::query_scalar("SELECT count(*) FROM object").fetch_one(database.pool()).await;
    let in_postgres: i64 = count.unwrap();
    assert_eq!(in_postgres, 1);
    assert!(!home.file("queue.db").exists() && !home.file("store.db").exists());
}

#[tokio::test]
async fn stop_under_load_drains_and_keeps_the_rest() {
    let (status_api, home) = Home::with_even_ids_online(MILLISECOND * 300);
    let (lastseen, endpoint) = home.start(&["--no-tester"]).await;
    let partner = Partner::default();
    let load = partner.post_all(endpoint, 0..6_000, 20, MILLISECOND * 5);
    wait_until("many lookups are in flight", async || status_api.in_flight() > 100).await;
    lastseen.stop().await;
    load.await.unwrap();
    let ledger = partner.ledger();
    assert!(ledger.refused.is_empty(), "{:?}", ledger.refused);
    assert!(ledger.accepted.len() > 200, "some were accepted before: {}", ledger.accepted.len());

    let _again = home.start(&["--no-tester"]).await;
    wait_until("each accepted id is looked up", async || {
        ledger.accepted.iter().all(|id| status_api.lookups_of(*id) > 0)
    })
    .await;
    let twice = ledger.accepted.iter().filter(|id| status_api.lookups_of(**id) > 1).count();
    assert_eq!(twice, 0, "a clean stop repeated lookups");
}
