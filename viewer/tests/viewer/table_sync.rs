use futures_util::FutureExt as _;
use messaging::events::Exchange;
use runtime::Supervisor;
use testkit::{Queue, RabbitNode, wait_until};

use crate::HOUR;
use crate::fixture::Fixture;

#[tokio::test]
async fn gap_makes_the_viewer_read_the_unannounced_changes() {
    let (fixture, viewer) = Fixture::showing([1, 2]).await;
    let mut subscriber = viewer.subscribe("", None).await;
    subscriber.expect_event("snapshot", [1, 2]).await;

    fixture.execute_without_event("INSERT INTO object VALUES (3, now())").await;
    fixture.execute_without_event("DELETE FROM object WHERE id = 1").await;
    // This emitter drops messages until it is connected. Then the number of the first message that
    // it publishes reveals the gap to the viewer.
    let emitter =
        messaging::events::Emitter::start(&fixture.exchange, "test", &Supervisor::default());
    for id in [10, 11] {
        let last_seen = std::time::SystemTime::UNIX_EPOCH;
        emitter.publish(
            messaging::events::Kind::Gone,
            std::iter::once(messaging::events::Object { id, last_seen }),
        );
    }
    assert_eq!(
        subscriber.next_sorted(2).await,
        [("gone".to_owned(), vec![1]), ("online".to_owned(), vec![3])]
    );
    viewer.expect_objects([2, 3]).await;
}

#[tokio::test]
async fn viewer_without_events_follows_the_table() {
    let fixture = Fixture::new().await;
    let viewer = fixture.start_viewer_with(Exchange::disabled()).await;
    let missing = viewer.health.missing_optional();
    assert!(missing.iter().any(|(name, _)| *name == "events"), "{missing:?}");
    fixture.record([1, 2]).await;
    viewer.expect_objects([1, 2]).await;
    fixture.execute_without_event("DELETE FROM object WHERE id = 1").await;
    viewer.expect_objects([2]).await;
}

#[tokio::test]
async fn changes_during_a_broker_restart_reach_subscribers() {
    let mut node = RabbitNode::start().await;
    let fixture = Fixture::on_broker(&node.amqp_uri(), Queue::on(&node.amqp_uri())).await;
    fixture.record([1]).await;
    fixture.record_aged([2], 2 * HOUR).await;
    let viewer = fixture.start_viewer().await;
    let mut subscriber = viewer.subscribe("", None).await;
    subscriber.expect_event("snapshot", [1, 2]).await;
    node.kill().await;
    // The events of these changes are lost.
    fixture.record([3]).await;
    fixture.clean_up().await;
    viewer.expect_objects([1, 3]).await;
    node.boot().await;
    fixture.wait_for_emitter().await;
    fixture.record([4]).await;
    viewer.expect_objects([1, 3, 4]).await;
    let online = |id| ("online".to_owned(), vec![id]);
    assert_eq!(
        subscriber.next_sorted(3).await,
        [("gone".to_owned(), vec![2]), online(3), online(4)]
    );
    wait_until("events arrive again", async || viewer.health.missing_optional().is_empty()).await;
}

#[tokio::test]
async fn before_the_first_reading_objects_are_503_and_streams_wait() {
    let fixture = Fixture::new().await;
    // Renames a column, because the store would create a missing table again.
    fixture.execute_without_event("ALTER TABLE object RENAME COLUMN last_seen TO elsewhere").await;
    let viewer = fixture.start_unready_viewer(fixture.exchange.clone()).await;
    let (status, problem) = viewer.get("/objects").await;
    assert!(
        status == 503 && problem["detail"].as_str().unwrap().contains("not read the table yet")
    );
    assert_eq!(viewer.get("/objects/1").await.0, 503);
    assert_eq!(viewer.get("/stats").await.0, 200);
    let mut subscriber = viewer.subscribe("", None).await;
    assert_eq!(viewer.health.missing().len(), 1);

    fixture.execute_without_event("INSERT INTO object VALUES (7, now())").await;
    fixture.execute_without_event("ALTER TABLE object RENAME COLUMN elsewhere TO last_seen").await;
    subscriber.expect_event("snapshot", [7]).await;
    assert!(viewer.health.missing().is_empty());
    // Once the viewer has read the table, it keeps showing the last known objects.
    fixture.execute_without_event("ALTER TABLE object RENAME COLUMN last_seen TO elsewhere").await;
    assert_eq!(viewer.ids().await, [7]);
}

#[tokio::test]
async fn critical_tasks_are_supervised_until_the_end() {
    let viewer = Fixture::new().await.start_viewer().await;
    let supervisor = viewer.supervisor.clone();
    let tasks = ["feed of changes", "metrics scraper", "publisher of changes", "table sync"];
    assert_eq!(supervisor.running(), tasks);
    viewer.stop().await;
    assert!(supervisor.failure().now_or_never().is_none(), "a clean end failed");
}
