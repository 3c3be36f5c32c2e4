//! Tests of the queue in a file only.

use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use messaging::queue::{
    Config, DeadLetter, DeadLetterAction, Disposition, Inspector, OpenError, Publisher, Selection,
    Settled,
};
use runtime::Supervisor;
use testkit::{Scratch, eventually};

use crate::queue::test_queue::{
    Backend, PATIENCE, TestQueue, ack_next, connected, connected_to, consumer, dead, file_config,
    next,
};

#[tokio::test]
async fn file_in_use_is_refused_to_a_second_owner() {
    let (queue, owner) = TestQueue::with(Backend::File, &[]).await;
    let open = || queue.config.open(&Supervisor::default());
    let refused = open().err().unwrap();
    assert!(matches!(refused, OpenError::InUse { .. }), "{refused}");
    owner.publish_ids("c", &[1], PATIENCE).await.unwrap();
    owner.close().await;
    let second = Publisher::start(open().unwrap(), "second");
    let mut consumer = consumer(&second, 1);
    assert_eq!(ack_next(&mut consumer, 1).await, [1]);
}

#[tokio::test]
async fn clones_of_one_broker_share_the_file() {
    let queue = TestQueue::new(Backend::File);
    let broker = queue.config.open(&Supervisor::default()).unwrap();
    let (one, other) = (connected_to(broker.clone()).await, connected_to(broker).await);
    one.publish_ids("c", &[1], PATIENCE).await.unwrap();
    let mut from_one = consumer(&one, 1);
    let mut from_other = consumer(&other, 1);
    let held = next(&mut from_one).await;
    other.publish_ids("c", &[2], PATIENCE).await.unwrap();
    assert_eq!(ack_next(&mut from_other, 1).await, [2]);
    // The file stays open as long as one of them uses it.
    one.close().await;
    other.publish_ids("c", &[3], PATIENCE).await.unwrap();
    assert_eq!(ack_next(&mut from_other, 1).await, [3]);
    assert_eq!(held.settle(Disposition::Ack).await, Settled::Done);
}

#[tokio::test]
async fn broker_keeps_the_file_open_without_publishers() {
    let queue = TestQueue::new(Backend::File);
    let open = || queue.config.open(&Supervisor::default());
    let broker = open().unwrap();
    connected_to(broker.clone()).await.close().await;
    let refused = open().err().unwrap();
    assert!(matches!(refused, OpenError::InUse { .. }), "{refused}");
    broker.close().await;
    open().unwrap().close().await;
}

#[tokio::test]
async fn inspector_creates_no_file() {
    let folder = Scratch::new("queue");
    let missing = Inspector::open(&file_config(&folder.path().join("queue.db"))).await;
    assert!(missing.is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn inspector_works_while_the_owner_uses_the_file() {
    let (queue, owner) = TestQueue::with(Backend::File, &[]).await;
    let mut inspector = Inspector::open(&queue.config).await.unwrap();
    let mut consumer = consumer(&owner, 1);
    let all = Selection::default();
    for id in 0..20 {
        owner.publish_ids("c", &[id], PATIENCE).await.unwrap();
        assert_eq!(inspector.depths().await.unwrap().ready, 1);
        next(&mut consumer).await.settle(dead("answered 500")).await;
        let on_done = |letter: DeadLetter| assert_eq!(letter.id, Some(id));
        inspector.dead_letters(&all, DeadLetterAction::Redrive, on_done).await.unwrap();
        assert_eq!(ack_next(&mut consumer, 1).await, [id]);
    }
}

/// Opens the file as soon as its previous owner has closed it.
async fn reopen(config: &Config) -> Publisher {
    eventually("the file can be opened again", PATIENCE, async || {
        match config.open(&Supervisor::default()) {
            Ok(broker) => Some(Publisher::start(broker, "again")),
            Err(OpenError::InUse { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    })
    .await
}

#[tokio::test]
async fn unsettled_messages_are_redelivered_after_a_drop() {
    let (queue, publisher) = TestQueue::with(Backend::File, &[1, 2, 3, 4]).await;
    let mut before = consumer(&publisher, 3);
    let settled = next(&mut before).await;
    let begun = next(&mut before).await;
    assert_eq!(settled.settle(Disposition::Ack).await, Settled::Done);
    drop((publisher, before, begun));

    let publisher = reopen(&queue.config).await;
    publisher.publish_ids("c", &[5], PATIENCE).await.unwrap();
    let mut after = consumer(&publisher, 1);
    // The file does not say which messages were delivered before, so all older ones count as
    // redelivered.
    for (id, redelivered) in [(2, true), (3, true), (4, true), (5, false)] {
        let delivery = next(&mut after).await;
        assert_eq!((delivery.id().unwrap(), delivery.redelivered()), (id, redelivered));
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    queue.wait_for_depths(0, 0, 0).await;
}

/// A consumer that is not notified polls only every 250 ms.
#[tokio::test]
async fn publish_wakes_a_waiting_consumer() {
    let (_queue, publisher) = TestQueue::with(Backend::File, &[]).await;
    let mut consumer = consumer(&publisher, 1);
    let mut fastest = Duration::MAX;
    for id in 0..10 {
        let publishing = async {
            // By then, the consumer has found the queue empty.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let published_at = Instant::now();
            publisher.publish_ids("c", &[id], PATIENCE).await.unwrap();
            published_at
        };
        let (published_at, delivered) = tokio::join!(publishing, async {
            let delivery = next(&mut consumer).await;
            let delivered_at = Instant::now();
            delivery.settle(Disposition::Ack).await;
            delivered_at
        });
        fastest = fastest.min(delivered.duration_since(published_at));
    }
    assert!(fastest < Duration::from_millis(100), "never sooner than {fastest:?}");
}

#[tokio::test]
async fn cancelled_settlement_leaves_the_message_in_flight() {
    let folder = Scratch::new("queue");
    let path = folder.path().join("queue.db");
    let publisher = connected(&file_config(&path)).await;
    publisher.publish_ids("c", &[7], PATIENCE).await.unwrap();
    let mut closed = consumer(&publisher, 1);
    let mut settling = Box::pin(next(&mut closed).await.settle(Disposition::Ack));
    // While another program writes, the ack cannot be committed before it is cancelled.
    let other = rusqlite::Connection::open(&path).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let is_pending = settling.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending();
    assert!(is_pending);
    drop(settling);
    other.execute_batch("ROLLBACK").unwrap();
    drop(closed);
    let mut consumer = consumer(&publisher, 1);
    let again = next(&mut consumer).await;
    assert_eq!((again.id().unwrap(), again.redelivered()), (7, true));
    assert_eq!(again.settle(Disposition::Ack).await, Settled::Done);
}

/// A publish may have to wait for one page of a redrive, but not for the whole redrive.
#[tokio::test]
async fn large_redrive_does_not_block_publishing() {
    let ids: Vec<i64> = (0..10_000).collect();
    let (queue, publisher) = TestQueue::with(Backend::File, &ids).await;
    let mut consumer = consumer(&publisher, 10_000);
    let mut settling = tokio::task::JoinSet::new();
    for _ in &ids {
        settling.spawn(next(&mut consumer).await.settle(dead("why")));
    }
    settling.join_all().await;

    let mut inspector = Inspector::open(&queue.config).await.unwrap();
    let redriving = async {
        let all = Selection::default();
        inspector.dead_letters(&all, DeadLetterAction::Redrive, |_| {}).await.unwrap();
    };
    let mut redriving = std::pin::pin!(redriving);
    let (started, mut commits) = (Instant::now(), 0);
    loop {
        tokio::select! {
            () = &mut redriving => break,
            outcome = publisher.publish_ids("c", &[-1], Duration::from_secs(1)) => {
                outcome.unwrap();
                commits += 1;
            }
        }
    }
    assert!(commits > 19, "only {commits} during 20 pages");
    // The redrive pauses for at least 30 ms after each page but the last.
    let took = started.elapsed();
    assert!(took >= Duration::from_millis(19 * 30), "no pauses: the redrive took only {took:?}");
}
