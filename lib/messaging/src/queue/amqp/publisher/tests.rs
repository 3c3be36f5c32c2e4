use std::time::Instant;

use futures_util::future::join_all;
use lapin::options::{QueueDeclareOptions, QueuePurgeOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties};

use super::*;
use crate::queue::config::{QueueConfig, QueueType};
use testkit::Queue;

fn start(queue: &Queue) -> Publisher {
    let (queue_name, queue_type) = (queue.name.clone(), QueueType::Quorum);
    let topology = Topology::new(&QueueConfig { queue_name, queue_type, shards: 1, amqp_ca: None });
    let uri = testkit::amqp_uri().parse().unwrap();
    Publisher::start(Access { uri, authorities: None }, topology, "test", &Supervisor::default())
}

async fn publish_one(
    publisher: &Publisher,
    queue: &str,
    within: Duration,
) -> Result<(), PublishError> {
    let (queue, body) = (queue.into(), b"{}".to_vec());
    let message = Outgoing { queue, body, properties: BasicProperties::default() };
    publisher.publish(std::iter::once(message), within).await
}

/// lapin attaches a returned message to the next confirm, which often belongs to another caller.
/// Without a check of the returned message's queue, the caller of an unroutable message would get a
/// confirm.
#[tokio::test]
async fn unroutable_batch_among_others_is_never_confirmed() {
    let queue = Queue::new();
    let publisher = start(&queue);
    let mut status = publisher.status();
    let within = Duration::from_secs(30);
    let missing_queue = format!("{}.nowhere", queue.name);
    let mut confirmed = 0;
    for _round in 0..10 {
        // Each unroutable message ends the session.
        timeout(within, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
        publish_one(&publisher, &queue.name, within).await.unwrap();
        confirmed += 1;
        let mut batches = tokio::task::JoinSet::new();
        for batch in 0..60 {
            let publisher = publisher.clone();
            let key = if batch == 30 { missing_queue.clone() } else { queue.name.clone() };
            batches.spawn(async move { (batch, publish_one(&publisher, &key, within).await) });
        }
        while let Some(published) = batches.join_next().await {
            match published.unwrap() {
                (30, outcome) => {
                    outcome.expect_err("a message without a queue must not be confirmed");
                }
                (_, Ok(())) => confirmed += 1,
                (_, Err(error)) => assert!(matches!(error, PublishError::Away(_)), "{error}"),
            }
        }
    }
    assert!(queue.depth(&queue.name).await.unwrap() >= confirmed);
}

/// Declares a queue that accepts one message and refuses all others. It cannot be the publisher's
/// main queue, because the publisher rejects a main queue with a length limit.
async fn declare_full(queue: &Queue) -> (Connection, lapin::Channel) {
    let uri = testkit::amqp_uri().parse().unwrap();
    let connection = Connection::connect_uri(uri, ConnectionProperties::default()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    let mut limit = FieldTable::default();
    limit.insert("x-max-length".into(), AMQPValue::LongInt(1));
    limit.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.name.as_str().into(), durable, limit).await.unwrap();
    (connection, channel)
}

#[tokio::test]
async fn message_to_a_full_queue_is_refused() {
    let (queue, full) = (Queue::new(), Queue::new());
    let _connection = declare_full(&full).await;
    let publisher = start(&queue);
    let within = Duration::from_secs(30);
    timeout(within, publisher.status().wait_for(Result::is_ok)).await.unwrap().unwrap();
    let to_full = || publish_one(&publisher, &full.name, within);
    let to_main = || publish_one(&publisher, &queue.name, within);
    to_full().await.unwrap();
    let refused = to_full().await.unwrap_err();
    assert!(matches!(refused, PublishError::Refused { .. }), "{refused}");
    // Each batch of a round gets its own reply.
    let (full, main) =
        tokio::join!(join_all([to_full(), to_full()]), join_all([to_main(), to_main()]));
    assert!(full.iter().all(Result::is_err) && main.iter().all(Result::is_ok));
}

/// Field case 1.13.
#[tokio::test]
async fn largest_callback_leaves_room_for_others() {
    let queue = Queue::new();
    let publisher = start(&queue);
    let acquire =
        |ids: usize| Arc::clone(&publisher.permits).try_acquire_many_owned(permits_for(ids));
    let largest = acquire(10_000).unwrap();
    let small: Vec<_> = (0..4).map(|_| acquire(200).unwrap()).collect();
    drop(largest);
    // This also holds for the largest callback that can be configured.
    drop(acquire(1_000_000).unwrap());
    drop(small);
}

/// Field case 3.1: a session whose queue refuses all messages must end, because the next one may
/// succeed.
#[tokio::test]
async fn refusing_queue_ends_the_session_and_is_reported() {
    let (queue, full) = (Queue::new(), Queue::new());
    let (_connection, channel) = declare_full(&full).await;
    let publisher = start(&queue);
    let (within, pause) = (Duration::from_secs(30), Duration::from_millis(100));
    let mut status = publisher.status();
    timeout(within, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    publish_one(&publisher, &full.name, within).await.unwrap();
    let mut errors = Vec::new();
    // Long enough for two sessions.
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        errors.extend(publish_one(&publisher, &full.name, within).await.err());
        // Confirms of another queue do not keep the session alive.
        let _ = publish_one(&publisher, &queue.name, within).await;
        tokio::time::sleep(pause).await;
    }
    let reason = status.borrow_and_update().clone().unwrap_err();
    assert!(reason.contains(&format!("queue {} refuses every message", full.name)), "{reason}");
    // When a session ends, the errors change from refusals to rejections without a session.
    let is_rejected = |error: &PublishError| matches!(error, PublishError::Away(_));
    let ends = errors.windows(2).filter(|two| !is_rejected(&two[0]) && is_rejected(&two[1]));
    let ends = ends.count();
    assert!((1..=2).contains(&ends), "{ends} sessions ended: {errors:?}");
    channel.queue_purge(full.name.as_str().into(), QueuePurgeOptions::default()).await.unwrap();
    timeout(within, publisher.wait_until_open()).await.unwrap();
    publish_one(&publisher, &full.name, within).await.unwrap();
    timeout(within, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
}
