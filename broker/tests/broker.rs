//! The queue, on a real RabbitMQ.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::time::{Duration, Instant};

use broker::{
    Config, Consumer, Delivery, Disposition, PublishError, Publisher, QueueType, Settled,
};
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use testbed::{Proxy, Queue, eventually};
use tokio::net::TcpListener;

const SECOND: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);

fn config(queue: &Queue, queue_type: QueueType) -> Config {
    let amqp_uri = testbed::amqp_uri().parse().unwrap();
    Config { amqp_uri, queue_name: queue.name.clone(), queue_type }
}

async fn connected_publisher(config: &Config) -> Publisher {
    let publisher = Publisher::start(config, "test publisher");
    let mut status = publisher.status();
    tokio::time::timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    publisher
}

fn consumer(config: &Config, prefetch: u16, publisher: &Publisher) -> Consumer {
    Consumer::new(config, "test consumer", prefetch, publisher.clone())
}

async fn next(consumer: &mut Consumer) -> Delivery {
    tokio::time::timeout(PATIENCE, consumer.next()).await.expect("a delivery should come")
}

async fn raw_channel() -> (Connection, Channel) {
    let properties = ConnectionProperties::default();
    let uri = testbed::amqp_uri().parse().unwrap();
    let connection = Connection::connect_uri(uri, properties).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

async fn delete(queue: &str) {
    let (_connection, channel) = raw_channel().await;
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
}

async fn declare(queue: &str, durable: bool, arguments: FieldTable) -> lapin::Result<()> {
    let (_connection, channel) = raw_channel().await;
    let options = QueueDeclareOptions { durable, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), options, arguments).await.map(drop)
}

fn arguments(list: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in list {
        table.insert((*name).into(), value.clone());
    }
    table
}

/// A header as the text that a person would see.
fn header(properties: &BasicProperties, name: &str) -> Option<String> {
    match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::LongLongInt(number) => Some(number.to_string()),
        other => panic!("unexpected header {name}: {other:?}"),
    }
}

#[tokio::test]
async fn a_confirmed_batch_is_delivered_id_by_id_with_its_callback_id() {
    let queue = Queue::new();
    let config = config(&queue, QueueType::Quorum);
    let publisher = connected_publisher(&config).await;
    publisher.publish_ids("callback-1", &[3, -7, i64::MAX], SECOND * 5).await.unwrap();
    let mut consumer = consumer(&config, 10, &publisher);
    let mut ids = Vec::new();
    for _ in 0..3 {
        let delivery = next(&mut consumer).await;
        assert_eq!(delivery.callback_id(), "callback-1");
        assert_eq!(delivery.failed_attempts(), 0);
        ids.push(delivery.id().unwrap());
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    ids.sort_unstable();
    assert_eq!(ids, [-7, 3, i64::MAX]);
    consumer.close().await;
    assert_eq!(queue.depth(&queue.name).await, Some(0), "what is acked must not come back");
}

#[tokio::test]
async fn messages_are_persistent_and_carry_when_they_were_published() {
    let queue = Queue::new();
    let publisher = connected_publisher(&config(&queue, QueueType::Quorum)).await;
    publisher.publish_ids("c", &[42], SECOND * 5).await.unwrap();
    let message = queue.get(&queue.name).await.unwrap().delivery;
    assert_eq!(message.data, br#"{"id":42}"#);
    assert_eq!(*message.properties.delivery_mode(), Some(2));
    assert!(message.properties.timestamp().is_some());
}

#[tokio::test]
async fn many_callers_at_once_are_all_confirmed() {
    let queue = Queue::new();
    let publisher = connected_publisher(&config(&queue, QueueType::Quorum)).await;
    let mut callers = tokio::task::JoinSet::new();
    for caller in 0..50 {
        let publisher = publisher.clone();
        callers.spawn(async move {
            let ids: Vec<i64> = (caller * 100..caller * 100 + 40).collect();
            publisher.publish_ids("c", &ids, PATIENCE).await
        });
    }
    while let Some(published) = callers.join_next().await {
        published.unwrap().unwrap();
    }
    assert_eq!(queue.depth(&queue.name).await, Some(2_000));
}

#[tokio::test]
async fn a_classic_queue_is_declared_as_the_go_services_declare_it() {
    let queue = Queue::new();
    // Ours first: theirs must not be refused.
    let publisher = connected_publisher(&config(&queue, QueueType::Classic)).await;
    declare(&queue.name, true, FieldTable::default()).await.unwrap();
    // Theirs first: ours takes it as its own, with nothing to warn of.
    drop(publisher);
    delete(&queue.name).await;
    declare(&queue.name, true, FieldTable::default()).await.unwrap();
    let publisher = connected_publisher(&config(&queue, QueueType::Classic)).await;
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    assert_eq!(queue.depth(&queue.name).await, Some(1));
}

#[tokio::test]
async fn a_queue_of_another_type_is_used_as_it_is() {
    let queue = Queue::new();
    declare(&queue.name, true, FieldTable::default()).await.unwrap();
    let publisher = connected_publisher(&config(&queue, QueueType::Quorum)).await;
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    assert_eq!(queue.depth(&queue.name).await, Some(1));
}

#[tokio::test]
async fn a_queue_that_would_lose_its_messages_is_refused() {
    let queue = Queue::new();
    declare(&queue.name, false, FieldTable::default()).await.unwrap();
    let publisher = Publisher::start(&config(&queue, QueueType::Classic), "test");
    let mut status = publisher.status();
    let refused = status
        .wait_for(|status| status.as_ref().is_err_and(|reason| reason.contains("other arguments")));
    tokio::time::timeout(PATIENCE, refused).await.unwrap().unwrap();
    let error = publisher.publish_ids("c", &[1], SECOND).await.unwrap_err();
    assert!(matches!(error, PublishError::Away(_)), "{error}");
}

#[tokio::test]
async fn a_message_of_the_go_producer_is_delivered() {
    let queue = Queue::new();
    let config = config(&queue, QueueType::Classic);
    let publisher = connected_publisher(&config).await;
    queue.publish_raw(br#"{"ID":42}"#).await;
    let mut consumer = consumer(&config, 1, &publisher);
    let delivery = next(&mut consumer).await;
    assert_eq!(delivery.id().unwrap(), 42);
    assert_eq!(delivery.callback_id(), "");
}

#[tokio::test]
async fn no_more_than_the_prefetch_is_delivered_until_something_is_settled() {
    let queue = Queue::new();
    let config = config(&queue, QueueType::Quorum);
    let publisher = connected_publisher(&config).await;
    publisher.publish_ids("c", &[1, 2, 3, 4, 5, 6], SECOND * 5).await.unwrap();
    let mut consumer = consumer(&config, 2, &publisher);
    let first = next(&mut consumer).await;
    let _second = next(&mut consumer).await;
    eventually("the rest stays in the queue", PATIENCE, async || {
        (queue.depth(&queue.name).await == Some(4)).then_some(())
    })
    .await;
    assert_eq!(first.settle(Disposition::Ack).await, Settled::Done);
    next(&mut consumer).await;
    eventually("one more was taken", PATIENCE, async || {
        (queue.depth(&queue.name).await == Some(3)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_retry_comes_back_after_its_wait_and_counts_the_attempt() {
    for queue_type in [QueueType::Quorum, QueueType::Classic] {
        let queue = Queue::new();
        let config = config(&queue, queue_type);
        let publisher = connected_publisher(&config).await;
        publisher.publish_ids("callback-9", &[7], SECOND * 5).await.unwrap();
        let mut consumer = consumer(&config, 1, &publisher);
        let delivery = next(&mut consumer).await;
        let failed_at = Instant::now();
        let retry = Disposition::Retry { reason: "answered 500".to_owned(), after: None };
        assert_eq!(delivery.settle(retry).await, Settled::Done);
        let again = next(&mut consumer).await;
        assert!(failed_at.elapsed() >= SECOND, "back after {:?}", failed_at.elapsed());
        assert_eq!(again.id().unwrap(), 7);
        assert_eq!(again.callback_id(), "callback-9");
        assert_eq!(again.failed_attempts(), 1);
        assert!(!again.redelivered(), "it is a new message, not the old one again");
        assert_eq!(again.settle(Disposition::Ack).await, Settled::Done);
        consumer.close().await;
        assert_eq!(queue.depth(&queue.name).await, Some(0));
    }
}

#[tokio::test]
async fn a_wait_that_the_peer_asked_for_is_kept() {
    let queue = Queue::new();
    let config = config(&queue, QueueType::Quorum);
    let publisher = connected_publisher(&config).await;
    publisher.publish_ids("c", &[7], SECOND * 5).await.unwrap();
    let mut consumer = consumer(&config, 1, &publisher);
    let failed_at = Instant::now();
    let after = Some(SECOND * 3);
    let retry = Disposition::Retry { reason: "answered 429".to_owned(), after };
    assert_eq!(next(&mut consumer).await.settle(retry).await, Settled::Done);
    next(&mut consumer).await;
    assert!(failed_at.elapsed() >= SECOND * 3, "back after {:?}", failed_at.elapsed());
}

#[tokio::test]
async fn a_dead_letter_keeps_its_body_and_tells_its_history() {
    let queue = Queue::new();
    let config = config(&queue, QueueType::Quorum);
    let publisher = connected_publisher(&config).await;
    publisher.publish_ids("callback-5", &[7], SECOND * 5).await.unwrap();
    let mut consumer = consumer(&config, 1, &publisher);
    let retry = Disposition::Retry { reason: "no answer".to_owned(), after: None };
    next(&mut consumer).await.settle(retry).await;
    let dead = Disposition::DeadLetter { reason: "answered 500".to_owned() };
    assert_eq!(next(&mut consumer).await.settle(dead).await, Settled::Done);
    consumer.close().await;
    assert_eq!(queue.depth(&queue.name).await, Some(0));

    let letter = queue.get(&queue.dead()).await.expect("it should be among the dead letters");
    assert_eq!(letter.delivery.data, br#"{"id":7}"#);
    let properties = &letter.delivery.properties;
    assert_eq!(*properties.delivery_mode(), Some(2));
    assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), "callback-5");
    assert_eq!(header(properties, "lastseen-reason").unwrap(), "answered 500");
    assert_eq!(header(properties, "lastseen-attempts").unwrap(), "2");
    let first = header(properties, "lastseen-first-failed-at").unwrap();
    let last = header(properties, "lastseen-last-failed-at").unwrap();
    assert!(first < last, "{first} {last}");
}

#[tokio::test]
async fn a_body_without_an_id_is_delivered_as_an_error_and_kept_whole() {
    let queue = Queue::new();
    let config = config(&queue, QueueType::Quorum);
    let publisher = connected_publisher(&config).await;
    queue.publish_raw(b"\xff{not json").await;
    let mut consumer = consumer(&config, 1, &publisher);
    let delivery = next(&mut consumer).await;
    let reason = delivery.id().unwrap_err().to_string();
    delivery.settle(Disposition::DeadLetter { reason }).await;
    let letter = queue.get(&queue.dead()).await.unwrap();
    assert_eq!(letter.delivery.data, b"\xff{not json");
}

#[tokio::test]
async fn what_a_lost_consumer_had_taken_is_delivered_again() {
    let queue = Queue::new();
    let config = config(&queue, QueueType::Quorum);
    let publisher = connected_publisher(&config).await;
    publisher.publish_ids("c", &[7], SECOND * 5).await.unwrap();
    let mut lost = consumer(&config, 1, &publisher);
    let delivery = next(&mut lost).await;
    drop(lost);
    let mut other = consumer(&config, 1, &publisher);
    let again = next(&mut other).await;
    assert_eq!((again.id().unwrap(), again.redelivered()), (7, true));
    // The first one can no longer be settled, and says so.
    assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Lost);
}

#[tokio::test]
async fn a_stopped_consumer_gives_back_what_it_had_not_begun_and_settles_the_rest() {
    let queue = Queue::new();
    let config = config(&queue, QueueType::Quorum);
    let publisher = connected_publisher(&config).await;
    publisher.publish_ids("c", &[1, 2, 3, 4], SECOND * 5).await.unwrap();
    let mut stopping = consumer(&config, 4, &publisher);
    let in_flight = next(&mut stopping).await;
    stopping.stop().await;
    eventually("three are given back", PATIENCE, async || {
        (queue.depth(&queue.name).await == Some(3)).then_some(())
    })
    .await;
    assert_eq!(in_flight.settle(Disposition::Ack).await, Settled::Done);
    stopping.close().await;
    assert_eq!(queue.depth(&queue.name).await, Some(3));
}

#[tokio::test]
async fn a_queue_that_would_drop_messages_is_refused_whichever_of_ours_it_is() {
    let expiring = arguments(&[
        ("x-queue-type", AMQPValue::LongString("quorum".into())),
        ("x-message-ttl", AMQPValue::LongLongInt(2_000)),
    ]);
    for suffix in ["", ".dead", ".retry.2s"] {
        let queue = Queue::new();
        declare(&format!("{}{suffix}", queue.name), true, expiring.clone()).await.unwrap();
        let publisher = Publisher::start(&config(&queue, QueueType::Quorum), "test");
        let mut status = publisher.status();
        let refused = status.wait_for(|status| {
            status.as_ref().is_err_and(|reason| reason.contains("other arguments"))
        });
        tokio::time::timeout(PATIENCE, refused).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_deleted_queue_is_never_confirmed_and_soon_there_again() {
    let queue = Queue::new();
    let publisher = connected_publisher(&config(&queue, QueueType::Quorum)).await;
    delete(&queue.name).await;
    let error = publisher.publish_ids("c", &[1, 2, 3], SECOND * 5).await.unwrap_err();
    assert!(matches!(error, PublishError::Unroutable), "{error}");
    eventually("the queue takes messages again", PATIENCE, async || {
        publisher.publish_ids("c", &[4], SECOND * 5).await.ok()
    })
    .await;
    assert!(queue.depth(&queue.name).await.unwrap() >= 1);
}

#[tokio::test]
async fn a_deleted_queue_is_declared_and_consumed_again() {
    let queue = Queue::new();
    let config = config(&queue, QueueType::Quorum);
    let publisher = connected_publisher(&config).await;
    let mut consumer = consumer(&config, 5, &publisher);
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    next(&mut consumer).await.settle(Disposition::Ack).await;
    delete(&queue.name).await;
    let delivery = tokio::spawn(async move { next(&mut consumer).await.id().unwrap() });
    eventually("the queue takes messages again", PATIENCE, async || {
        publisher.publish_ids("c", &[2], SECOND * 5).await.ok()
    })
    .await;
    assert_eq!(delivery.await.unwrap(), 2);
}

#[tokio::test]
async fn without_a_broker_a_publish_fails_at_once_and_says_why() {
    let queue = Queue::new();
    let nowhere = format!("amqp://guest:guest@127.0.0.1:{}/%2f", testbed::free_port());
    let amqp_uri = nowhere.parse().unwrap();
    let config = Config { amqp_uri, ..config(&queue, QueueType::Quorum) };
    let publisher = Publisher::start(&config, "test");
    let mut status = publisher.status();
    let refused = status.wait_for(|s| s.as_ref().is_err_and(|s| s.contains("cannot reach")));
    tokio::time::timeout(PATIENCE, refused).await.unwrap().unwrap();
    let started = Instant::now();
    let error = publisher.publish_ids("c", &[1], PATIENCE).await.unwrap_err();
    assert!(matches!(&error, PublishError::Away(why) if why.contains("cannot reach")), "{error}");
    assert!(started.elapsed() < SECOND);
    // And with nothing to publish there is nothing that could fail.
    publisher.publish_ids("c", &[], SECOND).await.unwrap();
}

#[tokio::test]
async fn a_peer_that_accepts_and_never_speaks_is_told_apart_from_one_that_refuses() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let queue = Queue::new();
    let amqp_uri = format!("amqp://guest:guest@{address}/%2f").parse().unwrap();
    let config = Config { amqp_uri, ..config(&queue, QueueType::Quorum) };
    let publisher = Publisher::start(&config, "test");
    let mut status = publisher.status();
    let silent = status.wait_for(|s| s.as_ref().is_err_and(|s| s.contains("does not speak AMQP")));
    tokio::time::timeout(PATIENCE, silent).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_broker_that_falls_silent_is_noticed_and_found_again() {
    let queue = Queue::new();
    let uri = testbed::amqp_uri();
    let target = uri.rsplit('@').next().unwrap().split('/').next().unwrap().to_owned();
    let proxy = Proxy::start(target.clone()).await;
    let through = uri.replace(&target, &proxy.addr().to_string());
    let amqp_uri = through.parse().unwrap();
    let config = Config { amqp_uri, ..config(&queue, QueueType::Quorum) };
    let publisher = connected_publisher(&config).await;
    let mut consumer = consumer(&config, 5, &publisher);
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    let held = next(&mut consumer).await;

    proxy.silence();
    let error = publisher.publish_ids("c", &[2], SECOND / 2).await.unwrap_err();
    assert!(matches!(error, PublishError::Timeout(_)), "{error}");
    let mut status = publisher.status();
    // Two heartbeats of 5 s, and the stall limit of 10 s, whichever comes first.
    tokio::time::timeout(PATIENCE * 2, status.wait_for(Result::is_err)).await.unwrap().unwrap();
    proxy.restore();
    tokio::time::timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    publisher.publish_ids("c", &[3], SECOND * 5).await.unwrap();
    // The consumer's own connection may have outlived the silence; if not, what was in flight by it
    // comes again by a new one.
    let lost = held.settle(Disposition::Ack).await == Settled::Lost;
    let mut ids = Vec::new();
    while !ids.contains(&3) || (lost && !ids.contains(&1)) {
        let delivery = next(&mut consumer).await;
        ids.push(delivery.id().unwrap());
        delivery.settle(Disposition::Ack).await;
    }
}

#[tokio::test]
async fn a_cancelled_consumer_is_not_mistaken_for_an_idle_one() {
    let queue = Queue::new();
    let config = config(&queue, QueueType::Quorum);
    let publisher = connected_publisher(&config).await;
    let (_connection, channel) = raw_channel().await;
    let mut ours = consumer(&config, 1, &publisher);
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    next(&mut ours).await.settle(Disposition::Ack).await;
    let mut status = ours.status();
    assert!(status.borrow_and_update().is_ok());
    let waiting = tokio::spawn(async move { next(&mut ours).await.id().unwrap() });
    channel.queue_delete(queue.name.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    tokio::time::timeout(PATIENCE, status.wait_for(Result::is_err)).await.unwrap().unwrap();
    tokio::time::timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    publisher.publish_ids("c", &[5], SECOND * 5).await.unwrap();
    assert_eq!(waiting.await.unwrap(), 5);
}
