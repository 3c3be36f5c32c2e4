use std::time::Duration;

use testkit::wait_until;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::fixture::Fixture;
use crate::{HOUR, PATIENCE};

#[tokio::test]
async fn subscriber_gets_a_snapshot_and_then_each_committed_change() {
    let (fixture, viewer) = Fixture::showing([1, 2]).await;
    let mut subscriber = viewer.subscribe("", None).await;
    subscriber.expect_event("snapshot", [1, 2]).await;
    fixture.record([3]).await;
    subscriber.expect_event("online", [3]).await;
    fixture.record([2]).await;
    subscriber.expect_event("seen", [2]).await;
    fixture.record_aged([4], 2 * HOUR).await;
    subscriber.expect_event("online", [4]).await;
    fixture.clean_up().await;
    subscriber.expect_event("gone", [4]).await;
    viewer.expect_objects([1, 2, 3]).await;
    viewer.stop().await;
    assert_eq!(
        timeout(PATIENCE, subscriber.next_or_end()).await.unwrap(),
        None,
        "the stream must end"
    );
}

#[tokio::test]
async fn reconnect_with_last_event_id_gets_each_change_once() {
    let (fixture, viewer) = Fixture::showing([]).await;
    let mut subscriber = viewer.subscribe("", None).await;
    subscriber.expect_event("snapshot", []).await;
    let mut received_ids = Vec::new();
    let last = 200;
    let record = async {
        for id in 1..=last {
            fixture.record([id]).await;
        }
    };
    let subscribe = async {
        // Reconnects after every few events.
        while received_ids.last() != Some(&last) {
            let mut again = viewer.subscribe("", Some(&subscriber.last_id)).await;
            for _ in 0..3 {
                if received_ids.last() == Some(&last) {
                    break;
                }
                let (name, ids) = again.next().await;
                assert_eq!(name, "online");
                received_ids.extend(ids);
            }
            subscriber.last_id = again.last_id;
        }
    };
    timeout(2 * PATIENCE, async { tokio::join!(record, subscribe) }).await.unwrap();
    assert_eq!(received_ids, (1..=last).collect::<Vec<_>>());
}

#[tokio::test]
async fn unknown_last_event_id_starts_with_a_snapshot() {
    let (_fixture, viewer) = Fixture::showing([1]).await;
    let own = {
        let mut subscriber = viewer.subscribe("", None).await;
        subscriber.expect_event("snapshot", [1]).await;
        subscriber.last_id
    };
    let (epoch, number) = own.split_once('-').unwrap();
    let beyond = format!("{epoch}-{}", number.parse::<u64>().unwrap() + 1_000);
    for id in ["nonsense", "0123456789abcdef-1", &beyond, "-"] {
        viewer.subscribe("", Some(id)).await.expect_event("snapshot", [1]).await;
    }
}

// Field case 7.5
#[tokio::test]
async fn last_event_id_is_accepted_in_the_query() {
    let (fixture, viewer) = Fixture::showing([1]).await;
    let mut first = viewer.subscribe("?_=1764356400000", None).await;
    first.expect_event("snapshot", [1]).await;
    fixture.record([2]).await;
    first.expect_event("online", [2]).await;
    fixture.record([3]).await;
    let query = format!("?lastEventId={}&_=1764356400001", first.last_id);
    viewer.subscribe(&query, None).await.expect_event("online", [3]).await;
    // The browser's header is newer, so it takes precedence.
    first.expect_event("online", [3]).await;
    fixture.record([4]).await;
    viewer.subscribe(&query, Some(&first.last_id)).await.expect_event("online", [4]).await;
}

#[tokio::test]
async fn subscriber_of_some_ids_gets_only_those_and_can_resume() {
    let (fixture, viewer) = Fixture::showing([1, 2, 3]).await;
    let query = "?ids=2,40,7";
    let mut subscriber = viewer.subscribe(query, None).await;
    subscriber.expect_event("snapshot", [2]).await;
    fixture.record([1, 3, 5]).await;
    fixture.record([4, 7, 8]).await;
    subscriber.expect_event("online", [7]).await;
    fixture.record([40, 41]).await;
    let mut again = viewer.subscribe(query, Some(&subscriber.last_id)).await;
    again.expect_event("online", [40]).await;
}

#[tokio::test]
async fn subscriber_that_reads_nothing_is_dropped_others_get_all() {
    const OBJECTS: i64 = 10_000;
    let (fixture, viewer) = Fixture::showing([]).await;
    let mut slow = TcpStream::connect(viewer.url.trim_start_matches("http://")).await.unwrap();
    slow.write_all(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let subscribers = async || viewer.get("/stats").await.1["subscribers"].as_u64().unwrap();
    wait_until("the subscriber is counted", async || subscribers().await == 1).await;
    let mut fast = viewer.subscribe("", None).await;
    fast.expect_event("snapshot", []).await;
    let receive_all = async {
        // Writes until the buffers of the slow subscriber are full and the viewer drops it.
        for write in 0.. {
            fixture.record(1..=OBJECTS).await;
            // Keep up with the writes: the viewer drops any reader that falls behind.
            while !fast.next().await.1.contains(&OBJECTS) {}
            if write > 20 && subscribers().await == 1 {
                break;
            }
        }
        fixture.record([0]).await;
        while fast.next().await != ("online".to_owned(), vec![0]) {}
    };
    timeout(Duration::from_mins(3), receive_all).await.unwrap();
    drop(slow);
}
