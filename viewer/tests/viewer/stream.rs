use std::time::Duration;

use testbed::eventually;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::fixture::Around;
use crate::{HOUR, PATIENCE};

#[tokio::test]
async fn a_subscriber_gets_a_snapshot_and_then_each_change_as_it_is_committed() {
    let around = Around::new().await;
    around.see([1, 2]).await;
    let viewer = around.view().await;
    viewer.shows([1, 2]).await;
    let mut subscriber = viewer.subscribe("", None).await;
    subscriber.gets("snapshot", [1, 2]).await;
    around.see([3]).await;
    subscriber.gets("online", [3]).await;
    around.see([2]).await;
    subscriber.gets("seen", [2]).await;
    around.see_ago([4], 2 * HOUR).await;
    subscriber.gets("online", [4]).await;
    around.clean_up().await;
    subscriber.gets("gone", [4]).await;
    viewer.shows([1, 2, 3]).await;
    viewer.stop().await;
    assert_eq!(timeout(PATIENCE, subscriber.next_or_end()).await.unwrap(), None, "it ends, too");
}

#[tokio::test]
async fn who_comes_back_with_the_last_id_misses_nothing_and_gets_nothing_twice() {
    let around = Around::new().await;
    let viewer = around.view().await;
    let mut subscriber = viewer.subscribe("", None).await;
    subscriber.gets("snapshot", []).await;
    let mut got = Vec::new();
    let last = 200;
    let tell = async {
        for id in 1..=last {
            around.see([id]).await;
        }
    };
    let listen = async {
        // Killed after every few events.
        while got.last() != Some(&last) {
            let mut again = viewer.subscribe("", Some(&subscriber.last_id)).await;
            for _ in 0..3 {
                if got.last() == Some(&last) {
                    break;
                }
                let (name, ids) = again.next().await;
                assert_eq!(name, "online");
                got.extend(ids);
            }
            subscriber.last_id = again.last_id;
        }
    };
    timeout(2 * PATIENCE, async { tokio::join!(tell, listen) }).await.unwrap();
    assert_eq!(got, (1..=last).collect::<Vec<_>>());
}

#[tokio::test]
async fn with_an_id_that_means_nothing_to_it_it_begins_with_a_snapshot() {
    let around = Around::new().await;
    around.see([1]).await;
    let viewer = around.view().await;
    viewer.shows([1]).await;
    let own = {
        let mut subscriber = viewer.subscribe("", None).await;
        subscriber.gets("snapshot", [1]).await;
        subscriber.last_id
    };
    let (epoch, number) = own.split_once('-').unwrap();
    let beyond = format!("{epoch}-{}", number.parse::<u64>().unwrap() + 1_000);
    for id in ["nonsense", "0123456789abcdef-1", &beyond, "-"] {
        viewer.subscribe("", Some(id)).await.gets("snapshot", [1]).await;
    }
}

// Field case 7.5
#[tokio::test]
async fn the_last_id_may_come_in_the_query_as_polyfills_send_it() {
    let around = Around::new().await;
    around.see([1]).await;
    let viewer = around.view().await;
    viewer.shows([1]).await;
    let mut first = viewer.subscribe("?_=1764356400000", None).await;
    first.gets("snapshot", [1]).await;
    around.see([2]).await;
    first.gets("online", [2]).await;
    around.see([3]).await;
    let query = format!("?lastEventId={}&_=1764356400001", first.last_id);
    viewer.subscribe(&query, None).await.gets("online", [3]).await;
    // The header is what the browser knows, and newer.
    first.gets("online", [3]).await;
    around.see([4]).await;
    viewer.subscribe(&query, Some(&first.last_id)).await.gets("online", [4]).await;
}

#[tokio::test]
async fn whoever_wants_some_objects_is_told_of_no_others_and_can_come_back_too() {
    let around = Around::new().await;
    around.see([1, 2, 3]).await;
    let viewer = around.view().await;
    viewer.shows([1, 2, 3]).await;
    let query = "?ids=2,40,7";
    let mut some = viewer.subscribe(query, None).await;
    some.gets("snapshot", [2]).await;
    around.see([1, 3, 5]).await;
    around.see([4, 7, 8]).await;
    some.gets("online", [7]).await;
    around.see([40, 41]).await;
    let mut again = viewer.subscribe(query, Some(&some.last_id)).await;
    again.gets("online", [40]).await;
}

#[tokio::test]
async fn a_subscriber_who_takes_nothing_is_dropped_while_another_gets_all() {
    const OBJECTS: i64 = 10_000;
    let around = Around::new().await;
    let viewer = around.view().await;
    let mut slow = TcpStream::connect(viewer.url.trim_start_matches("http://")).await.unwrap();
    slow.write_all(b"GET /events HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let subscribers = async || viewer.get("/stats").await.1["subscribers"].as_u64().unwrap();
    eventually("it is counted", PATIENCE, async || (subscribers().await == 1).then_some(())).await;
    let mut quick = viewer.subscribe("", None).await;
    quick.gets("snapshot", []).await;
    let all_is_received = async {
        // Until the buffers of the other one are full, and it is given up.
        for round in 0.. {
            around.see(1..=OBJECTS).await;
            // In step with the writes: a reader that falls behind is dropped as well.
            while !quick.next().await.1.contains(&OBJECTS) {}
            if round > 20 && subscribers().await == 1 {
                break;
            }
        }
        around.see([0]).await;
        while quick.next().await != ("online".to_owned(), vec![0]) {}
    };
    timeout(Duration::from_mins(3), all_is_received).await.unwrap();
    drop(slow);
}
