use std::time::Duration;

use testkit::{
    Answer, Database, Partner, Process, Queue, StatusApi, System, all_ready, callback_endpoint,
    eventually, free_port, viewer_address, wait_until,
};

use crate::PATIENCE;
use crate::fixture::get;
use crate::subscriber::Subscriber;

async fn subscriber(viewer: &Process, after: Option<&str>) -> Subscriber {
    Subscriber::connect(&url(viewer).await, "", after).await
}

async fn url(viewer: &Process) -> String {
    format!("http://{}", viewer_address(viewer).await)
}

/// Waits until no dependency of the service is away, not even an optional one. Without events, the
/// viewer could miss a change that is undone before its next reading of the table.
async fn wait_until_fully_ready(service: &Process) {
    wait_until("the service is fully ready", async || {
        service.get("/readyz").await == (200, "ready\n".to_owned())
    })
    .await;
}

/// Waits for an event of this kind about the object.
async fn wait_for_event(subscriber: &mut Subscriber, kind: &str, id: i64) {
    loop {
        let (received, ids) = subscriber.next().await;
        if received == kind && ids.contains(&id) {
            return;
        }
    }
}

#[tokio::test]
async fn posted_object_comes_online_in_the_stream_and_is_gone_later() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let api = StatusApi::start(|id, _| Answer::even_is_online(id));
    let system = System::new(&queue, &database, &api.endpoint());
    let producer = system.spawn("producer", &[]);
    let consumer = system.spawn("consumer", &[]);
    let lifetimes = [("OBJECT_TTL", "8s"), ("ROUTINE_INTERVAL", "200ms")];
    let routine = system.spawn("routine", &lifetimes);
    let metrics = format!("http://{}/metrics,http://127.0.0.1:1/metrics", consumer.admin().await);
    let settings = [("VIEWER_METRICS", metrics.as_str())];
    let mut viewer = system.spawn("viewer", &settings);
    for service in [&producer, &consumer, &routine, &viewer] {
        wait_until_fully_ready(service).await;
    }
    let mut stream = subscriber(&viewer, None).await;
    stream.expect_event("snapshot", []).await;
    let (partner, endpoint) = (Partner::default(), callback_endpoint(&producer).await);
    assert!(partner.post(&endpoint, &[2, 3]).await);
    stream.expect_event("online", [2]).await;
    // Object 3 is offline, so no event is about it.
    stream.expect_event("gone", [2]).await;

    let (_, stats) = get(&url(&viewer).await, "/stats").await;
    let statuses = &stats["services"];
    assert_eq!(statuses[0]["status"], "ok", "{stats}");
    assert!(statuses[1]["status"].as_str().unwrap().contains("error sending"), "{stats}");
    assert!(stats["lookups_by_outcome"]["online"].is_number(), "{stats}");

    // A viewer that is started again after a kill reads the table, with the changes since.
    viewer.kill();
    assert!(partner.post(&endpoint, &[4]).await);
    wait_until("object 4 is looked up", async || api.lookups_of(4) > 0).await;
    viewer = system.spawn("viewer", &settings);
    wait_until_fully_ready(&viewer).await;
    let mut again = subscriber(&viewer, Some(&stream.last_id)).await;
    // The new process numbers its changes anew, so the stream begins with a snapshot. Object 4 may
    // already be gone.
    assert_eq!(again.next().await.0, "snapshot");
    assert!(partner.post(&endpoint, &[6]).await);
    wait_for_event(&mut again, "online", 6).await;
    wait_for_event(&mut again, "gone", 6).await;
    for service in [viewer, routine, consumer, producer] {
        service.stop().await;
    }
    assert!(again.next_or_end().await.is_none(), "the stream ends with the viewer");
}

#[tokio::test]
async fn viewer_without_servers_reports_them_and_stops_on_sigterm() {
    let nowhere = free_port();
    let viewer = Process::spawn(
        "viewer",
        &[
            ("VIEWER_ADDR", "127.0.0.1:0".to_owned()),
            ("DATABASE_URL", format!("postgres://postgres@127.0.0.1:{nowhere}/postgres")),
            ("AMQP_URI", format!("amqp://127.0.0.1:{nowhere}")),
        ],
        &[],
    );
    viewer.wait_until_unready(&["first reading of the table: cannot connect"]).await;
    let mut stream = subscriber(&viewer, None).await;
    viewer.stop().await;
    assert!(stream.next_or_end().await.is_none());
}

#[tokio::test]
async fn invalid_setting_exits_with_78_and_names_allowed_values() {
    let bad = [
        ("VIEWER_ADDR", "9080", "expected IP:PORT"),
        ("VIEWER_MAX_CONNECTIONS", "0", "expected a whole number from 1 to 1000000"),
        ("VIEWER_SNAPSHOT", "/tmp", "expected the path of a file"),
        ("VIEWER_METRICS", "https://me:s3cret@host", "expected http://HOST:PORT/metrics"),
    ];
    for (name, value, allowed) in bad {
        let viewer = Process::spawn("viewer", &[(name, value.to_owned())], &[]);
        assert_eq!(viewer.wait().await.code(), Some(78));
        let log = viewer.log();
        let [line] = log.as_slice() else { panic!("{log:?}") };
        assert!(line.contains(name) && line.contains(allowed), "{line}");
        assert!(!line.contains("s3cret"), "{line}");
    }
}

#[tokio::test]
async fn paused_viewer_does_not_affect_the_write_side() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let api = StatusApi::start(|_, _| Answer::Online);
    let system = System::new(&queue, &database, &api.endpoint());
    let producer = system.spawn("producer", &[]);
    let consumer = system.spawn("consumer", &[]);
    let viewer = system.spawn("viewer", &[]);
    all_ready([&producer, &consumer, &viewer]).await;
    viewer.pause().await;
    let (partner, endpoint) = (Partner::default(), callback_endpoint(&producer).await);
    let all: Vec<i64> = (1..=2_000).collect();
    for ids in all.chunks(200) {
        assert!(partner.post(&endpoint, ids).await);
    }
    wait_until("all objects are written", async || {
        let count = sqlx::query_scalar("SELECT count(*) FROM object");
        let count: i64 = count.fetch_one(database.pool()).await.unwrap();
        count == 2_000
    })
    .await;
    assert_eq!(consumer.get("/readyz").await, (200, "ready\n".to_owned()));
    viewer.resume();
    let url = url(&viewer).await;
    eventually("the viewer has caught up", PATIENCE + Duration::from_secs(20), async || {
        (get(&url, "/stats").await.1["online"] == 2_000).then_some(())
    })
    .await;
}
