use std::time::Instant;

use ::amqp::Access;
use futures_util::future::join_all;
use lapin::options::{QueueDeclareOptions, QueuePurgeOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Connection, ConnectionProperties};

use super::*;
use crate::{QueueConfig, QueueType};
use testbed::Queue;

fn config(queue: &Queue) -> Config {
    let (queue_name, queue_type) = (queue.name.clone(), QueueType::Quorum);
    let queue = QueueConfig { queue_name, queue_type, amqp_ca: None };
    let uri = testbed::amqp_uri().parse().unwrap();
    Config { access: Access { uri, authorities: None }, queue }
}

async fn publish_one(
    publisher: &Publisher,
    queue: &str,
    within: Duration,
) -> Result<(), PublishError> {
    let message = Outgoing { body: b"{}".to_vec(), properties: BasicProperties::default() };
    publisher.publish(&queue.into(), std::iter::once(message), within).await
}

/// lapin hands a returned message to whichever publish is confirmed next, often another caller's.
/// Without looking at which queue is gone, a caller whose message is gone would hear "confirmed".
#[tokio::test]
async fn among_interleaved_batches_one_without_a_queue_is_never_confirmed() {
    let queue = Queue::new();
    let config = config(&queue);
    let publisher = Publisher::start(config, "test");
    let mut status = publisher.status();
    let within = Duration::from_secs(30);
    let nowhere = format!("{}.nowhere", queue.name);
    let mut confirmed = 0;
    for _round in 0..10 {
        // Each unroutable message ends the session.
        timeout(within, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
        publish_one(&publisher, &queue.name, within).await.unwrap();
        confirmed += 1;
        let mut batches = tokio::task::JoinSet::new();
        for batch in 0..60 {
            let publisher = publisher.clone();
            let key = if batch == 30 { nowhere.clone() } else { queue.name.clone() };
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

/// A queue that takes one message and refuses all further ones. A queue of our own name would be refused with
/// such a limit, so it is another one beside it.
async fn declare_full(queue: &Queue) -> (Connection, lapin::Channel) {
    let uri = testbed::amqp_uri().parse().unwrap();
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
async fn a_full_queue_is_an_error_and_not_a_confirm() {
    let (queue, full) = (Queue::new(), Queue::new());
    let config = config(&queue);
    let _connection = declare_full(&full).await;
    let publisher = Publisher::start(config, "test");
    let within = Duration::from_secs(30);
    timeout(within, publisher.status().wait_for(Result::is_ok)).await.unwrap().unwrap();
    let to_full = || publish_one(&publisher, &full.name, within);
    let to_ours = || publish_one(&publisher, &queue.name, within);
    to_full().await.unwrap();
    let refused = to_full().await.unwrap_err();
    assert!(matches!(refused, PublishError::Refused { .. }), "{refused}");
    // In one round, each batch has its own answer.
    let (full, ours) =
        tokio::join!(join_all([to_full(), to_full()]), join_all([to_ours(), to_ours()]));
    assert!(full.iter().all(Result::is_err) && ours.iter().all(Result::is_ok));
}

/// Field case 1.13.
#[tokio::test]
async fn largest_callback_leaves_room_for_others() {
    let queue = Queue::new();
    let publisher = Publisher::start(config(&queue), "test");
    let take = |ids: usize| Arc::clone(&publisher.places).try_acquire_many_owned(places_for(ids));
    let largest = take(10_000).unwrap();
    let small: Vec<_> = (0..4).map(|_| take(200).unwrap()).collect();
    drop(largest);
    // The largest that can be set is no exception, while others are under way.
    drop(take(1_000_000).unwrap());
    drop(small);
}

/// Field case 3.1: a session whose queue refuses everything must end, for the next one may fare better.
#[tokio::test]
async fn refusing_queue_ends_the_session_and_is_reported() {
    let (queue, full) = (Queue::new(), Queue::new());
    let (_connection, channel) = declare_full(&full).await;
    let publisher = Publisher::start(config(&queue), "test");
    let (within, pause) = (Duration::from_secs(30), Duration::from_millis(100));
    let mut status = publisher.status();
    timeout(within, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    publish_one(&publisher, &full.name, within).await.unwrap();
    let mut errors = Vec::new();
    // Long enough for two sessions.
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        errors.extend(publish_one(&publisher, &full.name, within).await.err());
        // That another queue takes messages is no excuse.
        let _ = publish_one(&publisher, &queue.name, within).await;
        tokio::time::sleep(pause).await;
    }
    let reason = status.borrow_and_update().clone().unwrap_err();
    assert!(reason.contains(&format!("queue {} refuses every message", full.name)), "{reason}");
    // Each session that has ended is followed by one that is tried.
    let turned_away = |error: &PublishError| matches!(error, PublishError::Away(_));
    let ends = errors.windows(2).filter(|two| !turned_away(&two[0]) && turned_away(&two[1]));
    let ends = ends.count();
    assert!((1..=2).contains(&ends), "{ends} sessions ended: {errors:?}");
    channel.queue_purge(full.name.as_str().into(), QueuePurgeOptions::default()).await.unwrap();
    timeout(within, publisher.opened()).await.unwrap();
    publish_one(&publisher, &full.name, within).await.unwrap();
    timeout(within, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
}
