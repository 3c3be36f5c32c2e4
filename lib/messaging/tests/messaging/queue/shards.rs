//! Messages distributed over shards.

use std::collections::HashSet;

use futures_util::future::join_all;
use messaging::queue::{Config, Consumer, DeadLetterAction, Disposition, QueueType, Settled};
use testkit::{Queue, wait_until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::queue::test_queue::{
    PATIENCE, QUIET_TIME, ack_next, amqp_config, connected, consumer, dead, next, process_all, take,
};

const IDS: i64 = 40;

/// The settings of a process with this number of shards.
fn config(queue: &Queue, shards: u16) -> Config {
    let mut config = amqp_config(queue, QueueType::Quorum);
    config.queue.shards = shards;
    config
}

/// The queue of a shard, which is deleted on drop.
fn shard(queue: &Queue, number: u16) -> Queue {
    let mut shard = Queue::new();
    shard.name = format!("{}.{number}", queue.name);
    shard
}

/// Publishes one message about each of [`IDS`] objects.
async fn publish(queue: &Queue, shards: u16) {
    let publisher = connected(&config(queue, shards)).await;
    let ids: Vec<i64> = (0..IDS).collect();
    publisher.publish_ids("c", &ids, PATIENCE).await.unwrap();
    publisher.close().await;
}

/// Starts a consumer and waits until it is connected. There must be no messages yet.
async fn idle_consumer(queue: &Queue, shards: u16) -> Consumer {
    let mut consumer = start_consumer(queue, shards).await;
    let mut status = consumer.status();
    tokio::select! {
        _ = consumer.next() => panic!("there is a message"),
        connected = timeout(PATIENCE, status.wait_for(Result::is_ok)) => {
            connected.expect("the consumer should connect").unwrap();
        }
    }
    consumer
}

async fn start_consumer(queue: &Queue, shards: u16) -> Consumer {
    consumer(&connected(&config(queue, shards)).await, 1_000)
}

/// Waits until the main queue and the first shards have these numbers of ready messages.
async fn wait_for_depths(queue: &Queue, expected: &[u32]) {
    let message = format!("the depths are {expected:?}");
    wait_until(&message, async || depths(queue, expected.len()).await == expected).await;
}

/// The ready messages of the main queue and of the first shards, in `queues` queues.
async fn depths(queue: &Queue, queues: usize) -> Vec<u32> {
    let mut depths = vec![queue.depth(&queue.name).await.unwrap()];
    for shard in 1..queues {
        let name = format!("{}.{}", queue.name, shard - 1);
        depths.push(queue.depth(&name).await.unwrap());
    }
    depths
}

/// Whether the broker respects the priorities of a shard's consumers, as RabbitMQ 4 does. The
/// version is in the first frame that the broker sends.
async fn broker_has_priorities() -> bool {
    let uri = testkit::amqp_uri();
    let address = uri.rsplit('@').next().unwrap().split('/').next().unwrap();
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"AMQP\x00\x00\x09\x01").await.unwrap();
    let mut header = [0; 7];
    stream.read_exact(&mut header).await.unwrap();
    let length = u32::from_be_bytes(header[3..].try_into().unwrap());
    let mut frame = vec![0; length.try_into().unwrap()];
    stream.read_exact(&mut frame).await.unwrap();
    // A name, the type S of a long string, and its length.
    let entry = b"\x07versionS\x00\x00\x00";
    let at = frame.windows(entry.len()).position(|window| window == entry).unwrap();
    frame[at + entry.len() + 1] >= b'4'
}

/// Each of the [`IDS`] ids `times` times.
fn repeated(times: usize) -> Vec<i64> {
    (0..IDS).flat_map(|id| std::iter::repeat_n(id, times)).collect()
}

fn sorted(mut ids: Vec<i64>) -> Vec<i64> {
    ids.sort_unstable();
    ids
}

#[tokio::test]
async fn object_always_has_the_same_shard() {
    let queue = Queue::new();
    publish(&queue, 4).await;
    let once = depths(&queue, 5).await;
    assert_eq!((once[0], once.iter().sum::<u32>()), (0, 40), "{once:?}");
    assert!(once[1..].iter().all(|depth| *depth > 0), "{once:?}");
    publish(&queue, 4).await;
    let twice: Vec<u32> = once.iter().map(|depth| 2 * depth).collect();
    assert_eq!(depths(&queue, 5).await, twice);
}

#[tokio::test]
async fn consumer_reads_the_main_queue_and_all_shards() {
    let queue = Queue::new();
    publish(&queue, 4).await;
    // A Go producer, or one whose number of shards is smaller or larger.
    publish(&queue, 1).await;
    publish(&queue, 2).await;
    publish(&queue, 6).await;
    let mut consumer = start_consumer(&queue, 4).await;
    assert_eq!(sorted(ack_next(&mut consumer, 160).await), repeated(4));
    consumer.close().await;
    wait_for_depths(&queue, &[0; 7]).await;
}

#[tokio::test]
async fn consumer_without_shards_reads_those_of_before() {
    let queue = Queue::new();
    publish(&queue, 4).await;
    let mut consumer = start_consumer(&queue, 1).await;
    assert_eq!(sorted(ack_next(&mut consumer, 40).await), repeated(1));
    consumer.close().await;
    wait_for_depths(&queue, &[0; 5]).await;
}

/// A closed channel discards acks that its process has not yet passed to the queue.
#[tokio::test]
async fn acks_before_a_close_are_applied_to_shards() {
    let queue = Queue::new();
    for _ in 0..20 {
        publish(&queue, 2).await;
    }
    let mut consumer = start_consumer(&queue, 2).await;
    let mut deliveries = take(&mut consumer, 800).await;
    // While the first delivery is unsettled, the others cannot share an ack.
    let unsettled = deliveries.remove(0);
    let acks = deliveries.into_iter().map(|delivery| delivery.settle(Disposition::Ack));
    let settled = join_all(acks).await;
    assert!(settled.iter().all(|settled| *settled == Settled::Done));
    consumer.close().await;
    drop(unsettled);
    wait_until("only the unsettled message is left", async || {
        depths(&queue, 3).await.iter().sum::<u32>() == 1
    })
    .await;
}

#[tokio::test]
async fn requeued_and_redriven_messages_return_to_their_shard() {
    let queue = Queue::new();
    publish(&queue, 4).await;
    let before = depths(&queue, 5).await;
    let mut consumer = start_consumer(&queue, 4).await;
    for delivery in take(&mut consumer, 40).await {
        let disposition =
            if delivery.id().unwrap() % 2 == 0 { Disposition::Requeue } else { dead("test") };
        assert_eq!(delivery.settle(disposition).await, Settled::Done);
    }
    consumer.close().await;
    assert_eq!(process_all(&config(&queue, 4), DeadLetterAction::Redrive).await.len(), 20);
    wait_for_depths(&queue, &before).await;
}

/// As in a deployment that restarts the producers first.
#[tokio::test]
async fn consumer_that_is_older_than_the_shards_gets_all_messages() {
    let queue = Queue::new();
    let mut old = idle_consumer(&queue, 1).await;
    let publisher = connected(&config(&queue, 4)).await;
    let ids: Vec<i64> = (0..IDS).collect();
    publisher.publish_ids("c", &ids, PATIENCE).await.unwrap();
    assert_eq!(sorted(ack_next(&mut old, 40).await), ids);
    old.close().await;

    // The consumer that replaces it holds one message of each queue.
    let mut new = consumer(&connected(&config(&queue, 4)).await, 1);
    let held = tokio::spawn(async move { take(&mut new, 2).await });
    wait_until("messages reach a shard", async || {
        publisher.publish_ids("c", &ids, PATIENCE).await.unwrap();
        depths(&queue, 5).await[1..].iter().any(|depth| *depth > 0)
    })
    .await;
    held.await.unwrap();
}

#[tokio::test]
async fn shards_beyond_a_deleted_one_are_still_read() {
    let queue = Queue::new();
    publish(&queue, 4).await;
    let mut deliveries = start_consumer(&queue, 1).await;
    assert_eq!(ack_next(&mut deliveries, 40).await.len(), 40);
    shard(&queue, 1).delete().await;
    // The first session ends, and the next one must find the other shards.
    let mut status = deliveries.status();
    let ended = async { status.wait_for(Result::is_err).await.unwrap().clone() };
    tokio::select! {
        _ = deliveries.next() => panic!("there is a message"),
        _ = timeout(PATIENCE, ended) => {}
    }
    // Publish without the declarations of a producer, which would create the deleted queue again.
    let shards = [0, 2, 3].map(|number| shard(&queue, number));
    for shard in &shards {
        shard.publish_raw(b"{\"id\":7}").await;
    }
    assert_eq!(ack_next(&mut deliveries, 3).await, [7, 7, 7]);
}

#[tokio::test]
async fn queue_with_the_name_of_a_shard_is_left_alone() {
    let (queue, other) = (Queue::new(), Queue::new());
    let mut other_config = config(&other, 1);
    other_config.queue.queue_name = format!("{}.0", queue.name);
    let other_publisher = connected(&other_config).await;
    let mut deliveries = idle_consumer(&queue, 1).await;
    other_publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    let publisher = connected(&config(&queue, 1)).await;
    publisher.publish_ids("c", &[2], PATIENCE).await.unwrap();
    assert_eq!(ack_next(&mut deliveries, 1).await, [2]);
    assert_eq!(queue.depth(&other_config.queue.queue_name).await, Some(1));
    let mut others = consumer(&other_publisher, 1);
    assert_eq!(ack_next(&mut others, 1).await, [1]);
}

#[tokio::test]
async fn changed_prefetch_applies_to_shards() {
    let queue = Queue::new();
    let publisher = connected(&config(&queue, 2)).await;
    let mut deliveries = consumer(&publisher, 1);
    publish(&queue, 2).await;
    let first = take(&mut deliveries, 2).await;
    timeout(QUIET_TIME, deliveries.next()).await.err().expect("each shard delivers one message");
    deliveries.set_prefetch(100).await;
    let others = take(&mut deliveries, 38).await;
    let mut ids = Vec::new();
    for delivery in first.into_iter().chain(others) {
        ids.push(delivery.id().unwrap());
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    assert_eq!(sorted(ids), repeated(1));
    deliveries.close().await;
    wait_for_depths(&queue, &[0, 0, 0]).await;
}

/// Each shard has one consumer at a time. When a consumer ends, another one gets its shards.
#[tokio::test]
async fn remaining_consumer_takes_over_the_shards() {
    let queue = Queue::new();
    let mut first = idle_consumer(&queue, 32).await;
    let mut second = idle_consumer(&queue, 32).await;
    publish(&queue, 32).await;
    publish(&queue, 32).await;
    let (mut unsettled, mut of_first, mut of_second) = (Vec::new(), HashSet::new(), HashSet::new());
    for _ in 0..80 {
        tokio::select! {
            delivery = next(&mut first) => {
                of_first.insert(delivery.id().unwrap());
                unsettled.push(delivery);
            }
            delivery = next(&mut second) => {
                of_second.insert(delivery.id().unwrap());
                assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
            }
        }
    }
    assert!(of_first.is_disjoint(&of_second), "{of_first:?} {of_second:?}");
    assert_eq!(
        (of_first.is_empty(), of_second.is_empty()),
        (false, !broker_has_priorities().await)
    );
    drop((first, unsettled));
    publish(&queue, 32).await;
    let redelivered = ack_next(&mut second, 2 * of_first.len() + 40).await;
    let expected = of_first.iter().flat_map(|id| [*id; 2]).chain(repeated(1)).collect();
    assert_eq!(sorted(redelivered), sorted(expected));
}
