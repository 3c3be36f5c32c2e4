use std::time::Duration;

use pipeline::{Partner, Surroundings, callback_endpoint, viewer_url};
use testbed::{Answer, Database, Process, Queue, StatusApi, eventually, free_port};

use crate::PATIENCE;
use crate::fixture::get;
use crate::subscriber::Subscriber;

async fn subscriber(viewer: &Process, after: Option<&str>) -> Subscriber {
    Subscriber::connect(&viewer_url(viewer).await, "", after).await
}

/// Waits until it has all, also what it can do without: what is committed before somebody can tell it may be
/// gone again before anybody looks.
async fn needs_nothing(service: &Process) {
    eventually("it has all", PATIENCE, async || {
        (service.get("/readyz").await == (200, "ready\n".to_owned())).then_some(())
    })
    .await;
}

/// Waits until an event of that name is about the object.
async fn is_told(subscriber: &mut Subscriber, name: &str, id: i64) {
    loop {
        let (told, ids) = subscriber.next().await;
        if told == name && ids.contains(&id) {
            return;
        }
    }
}

#[tokio::test]
async fn who_is_posted_to_callback_comes_online_in_the_stream_and_is_gone_later() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let api = StatusApi::start(|id, _| if id % 2 == 0 { Answer::Online } else { Answer::Offline });
    let surroundings =
        Surroundings::new(&testbed::amqp_uri(), &queue.name, database.environment(), &api);
    let producer = surroundings.spawn("producer", &[]);
    let consumer = surroundings.spawn("consumer", &[]);
    let lifetimes = [("OBJECT_TTL", "8s"), ("ROUTINE_INTERVAL", "200ms")];
    let routine = surroundings.spawn("routine", &lifetimes);
    let metrics = format!("http://{}/metrics,http://127.0.0.1:1/metrics", consumer.admin().await);
    let settings = [("VIEWER_METRICS", metrics.as_str())];
    let mut viewer = surroundings.spawn("viewer", &settings);
    for service in [&producer, &consumer, &routine, &viewer] {
        needs_nothing(service).await;
    }
    let mut stream = subscriber(&viewer, None).await;
    stream.gets("snapshot", []).await;
    let (partner, endpoint) = (Partner::default(), callback_endpoint(&producer).await);
    assert!(partner.post(&endpoint, &[2, 3]).await);
    stream.gets("online", [2]).await;
    // The other one is offline, and nothing is told of it.
    stream.gets("gone", [2]).await;

    let (_, stats) = get(&viewer_url(&viewer).await, "/stats").await;
    let statuses = &stats["services"];
    assert_eq!(statuses[0]["status"], "ok", "{stats}");
    assert!(statuses[1]["status"].as_str().unwrap().contains("error sending"), "{stats}");
    assert!(stats["lookups_by_outcome"]["online"].is_number(), "{stats}");

    // Killed, it comes back with what was committed meanwhile.
    viewer.kill();
    assert!(partner.post(&endpoint, &[4]).await);
    eventually("it is looked up", PATIENCE, async || (api.lookups_of(4) > 0).then_some(())).await;
    viewer = surroundings.spawn("viewer", &settings);
    needs_nothing(&viewer).await;
    let mut again = subscriber(&viewer, Some(&stream.last_id)).await;
    // Its own numbers are new ones: it begins with a snapshot, in which 4 is or is not any more.
    assert_eq!(again.next().await.0, "snapshot");
    assert!(partner.post(&endpoint, &[6]).await);
    is_told(&mut again, "online", 6).await;
    is_told(&mut again, "gone", 6).await;
    for service in [viewer, routine, consumer, producer] {
        service.terminate();
        assert_eq!(service.wait().await.code(), Some(0));
    }
    assert!(again.next_or_end().await.is_none(), "the stream ends with the viewer");
}

#[tokio::test]
async fn a_viewer_without_its_servers_says_what_it_misses_and_ends_when_told() {
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
    eventually("it says what it misses", PATIENCE, async || {
        let (status, body) = viewer.get("/readyz").await;
        (status == 503 && body.contains("first reading of the table: cannot connect")).then_some(())
    })
    .await;
    let mut stream = subscriber(&viewer, None).await;
    viewer.terminate();
    assert_eq!(viewer.wait().await.code(), Some(0));
    assert!(stream.next_or_end().await.is_none());
}

#[tokio::test]
async fn a_setting_that_is_not_allowed_ends_it_with_78_and_is_told_with_what_is_allowed() {
    let bad = [
        ("VIEWER_ADDR", "9080", "expected IP:PORT"),
        ("VIEWER_MAX_CONNECTIONS", "0", "expected a number from 1 to 1000000"),
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
async fn the_write_side_does_not_notice_a_viewer_that_is_stopped_in_its_tracks() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let api = StatusApi::start(|_, _| Answer::Online);
    let surroundings =
        Surroundings::new(&testbed::amqp_uri(), &queue.name, database.environment(), &api);
    let producer = surroundings.spawn("producer", &[]);
    let consumer = surroundings.spawn("consumer", &[]);
    let viewer = surroundings.spawn("viewer", &[]);
    for service in [&producer, &consumer, &viewer] {
        service.ready().await;
    }
    viewer.pause().await;
    let (partner, endpoint) = (Partner::default(), callback_endpoint(&producer).await);
    let all: Vec<i64> = (1..=2_000).collect();
    for ids in all.chunks(200) {
        assert!(partner.post(&endpoint, ids).await);
    }
    eventually("all are written", PATIENCE, async || {
        let count = sqlx::query_scalar("SELECT count(*) FROM object");
        let count: i64 = count.fetch_one(database.pool()).await.unwrap();
        (count == 2_000).then_some(())
    })
    .await;
    assert_eq!(consumer.get("/readyz").await, (200, "ready\n".to_owned()));
    viewer.resume();
    let url = viewer_url(&viewer).await;
    eventually("the viewer has caught up", PATIENCE + Duration::from_secs(20), async || {
        (get(&url, "/stats").await.1["online"] == 2_000).then_some(())
    })
    .await;
}
