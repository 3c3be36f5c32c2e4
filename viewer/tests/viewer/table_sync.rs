use events::Exchange;
use testbed::{Queue, RabbitNode, eventually};

use crate::fixture::Around;
use crate::{HOUR, PATIENCE};

#[tokio::test]
async fn what_was_not_told_is_found_in_the_table_as_soon_as_a_gap_shows() {
    let around = Around::new().await;
    around.see([1, 2]).await;
    let viewer = around.view().await;
    let mut subscriber = viewer.subscribe("", None).await;
    subscriber.gets("snapshot", [1, 2]).await;

    around.silently("INSERT INTO object VALUES (3, now())").await;
    around.silently("DELETE FROM object WHERE id = 1").await;
    // Another source, of which nobody has heard the first message.
    let lost = events::Emitter::start(&around.exchange, "test");
    for id in [10, 11] {
        let last_seen = std::time::SystemTime::UNIX_EPOCH;
        lost.publish(events::Kind::Gone, std::iter::once(events::Object { id, last_seen }));
    }
    let mut told = Vec::new();
    for _ in 0..2 {
        told.push(subscriber.next().await);
    }
    told.sort();
    assert_eq!(told, [("gone".to_owned(), vec![1]), ("online".to_owned(), vec![3])]);
    viewer.shows([2, 3]).await;
}

#[tokio::test]
async fn a_viewer_without_events_follows_the_table_all_the_same() {
    let around = Around::new().await;
    let viewer = around.view_with(Exchange::disabled()).await;
    let away = viewer.health.missing_optional();
    assert!(away.iter().any(|(name, _)| *name == "events"), "{away:?}");
    around.see([1, 2]).await;
    viewer.shows([1, 2]).await;
    around.silently("DELETE FROM object WHERE id = 1").await;
    viewer.shows([2]).await;
}

#[tokio::test]
async fn what_happens_while_the_broker_restarts_is_shown_and_told_afterwards() {
    let mut node = RabbitNode::start().await;
    let around = Around::at(&node.amqp_uri(), Queue::on(&node.amqp_uri())).await;
    around.see([1]).await;
    around.see_ago([2], 2 * HOUR).await;
    let viewer = around.view().await;
    let mut subscriber = viewer.subscribe("", None).await;
    subscriber.gets("snapshot", [1, 2]).await;
    node.kill().await;
    // Told to nobody.
    around.see([3]).await;
    around.clean_up().await;
    viewer.shows([1, 3]).await;
    node.boot().await;
    around.can_tell().await;
    around.see([4]).await;
    viewer.shows([1, 3, 4]).await;
    let mut told = Vec::new();
    for _ in 0..3 {
        told.push(subscriber.next().await);
    }
    told.sort();
    let online = |id| ("online".to_owned(), vec![id]);
    assert_eq!(told, [("gone".to_owned(), vec![2]), online(3), online(4)]);
    eventually("events come again", PATIENCE, async || {
        viewer.health.missing_optional().is_empty().then_some(())
    })
    .await;
}

#[tokio::test]
async fn before_the_table_was_read_nothing_is_said_about_it_and_a_subscriber_waits() {
    let around = Around::new().await;
    // A table that is missing would be created again.
    around.silently("ALTER TABLE object RENAME COLUMN last_seen TO elsewhere").await;
    let viewer = around.view_unready(around.exchange.clone());
    let (status, problem) = viewer.get("/objects").await;
    assert!(status == 503 && problem["detail"].as_str().unwrap().contains("not read yet"));
    assert_eq!(viewer.get("/objects/1").await.0, 503);
    assert_eq!(viewer.get("/stats").await.0, 200);
    let mut subscriber = viewer.subscribe("", None).await;
    assert_eq!(viewer.health.missing().len(), 1);

    around.silently("INSERT INTO object VALUES (7, now())").await;
    around.silently("ALTER TABLE object RENAME COLUMN elsewhere TO last_seen").await;
    subscriber.gets("snapshot", [7]).await;
    assert!(viewer.health.missing().is_empty());
    // Once it knows something it goes on with that.
    around.silently("ALTER TABLE object RENAME COLUMN last_seen TO elsewhere").await;
    assert_eq!(viewer.ids().await, [7]);
}
