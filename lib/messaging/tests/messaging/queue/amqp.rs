//! Tests of the queue on RabbitMQ only.

use std::pin::pin;
use std::time::Instant;

use futures_util::FutureExt as _;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use messaging::queue::{
    Config, DeadLetterAction, Depths, Disposition, InspectError, Inspector, PublishError,
    Publisher, QueueType, Selection, Settled,
};
use runtime::Supervisor;
use testkit::{Proxy, Queue, eventually};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::block_in_place;
use tokio::time::timeout;

use crate::queue::test_queue::{
    PATIENCE, SECOND, ack_next, amqp_config, config_at, connected, consumer, dead, ids, next,
    poll_times, process_all, process_dead_letters, refused, retry, take,
};

/// A quorum queue with a publisher.
async fn quorum_queue() -> (Queue, Config, Publisher) {
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    let publisher = connected(&config).await;
    (queue, config, publisher)
}

/// A quorum queue whose dead letters have these bodies and properties.
async fn queue_with_letters(
    letters: impl IntoIterator<Item = (Vec<u8>, BasicProperties)>,
) -> (Queue, Config) {
    let (queue, config, publisher) = quorum_queue().await;
    publisher.close().await;
    let (_connection, channel) = raw_channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let mut confirms = Vec::new();
    for (body, properties) in letters {
        let dead = queue.dead().into();
        let sent = channel.basic_publish("".into(), dead, mandatory, &body, properties);
        confirms.push(sent.await.unwrap());
    }
    for confirm in confirms {
        assert!(matches!(confirm.await.unwrap(), Confirmation::Ack(None)));
    }
    (queue, config)
}

fn letter(id: i64) -> (Vec<u8>, BasicProperties) {
    (format!("{{\"id\":{id}}}").into_bytes(), BasicProperties::default())
}

async fn raw_channel() -> (Connection, Channel) {
    crate::channel(&testkit::amqp_uri()).await
}

/// The broker behind a proxy.
async fn through_a_proxy(queue: &Queue) -> (Proxy, Config) {
    let (proxy, uri) = Proxy::before(&testkit::amqp_uri()).await;
    (proxy, config_at(&uri, &queue.name, QueueType::Quorum))
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

#[tokio::test]
async fn messages_are_persistent_and_have_a_timestamp() {
    let (queue, _, publisher) = quorum_queue().await;
    publisher.publish_ids("c", &[42], SECOND * 5).await.unwrap();
    let message = queue.get(&queue.name).await.unwrap().delivery;
    assert_eq!(message.data, br#"{"id":42}"#);
    assert_eq!(*message.properties.delivery_mode(), Some(2));
    assert!(message.properties.timestamp().is_some());
}

#[tokio::test]
async fn classic_queue_is_compatible_with_the_go_services() {
    let queue = Queue::new();
    // Lastseen's declaration first: that of the Go services must not be refused.
    let publisher = connected(&amqp_config(&queue, QueueType::Classic)).await;
    declare(&queue.name, true, FieldTable::default()).await.unwrap();
    // The Go services' declaration first: Lastseen must accept the queue without a warning.
    drop(publisher);
    delete(&queue.name).await;
    declare(&queue.name, true, FieldTable::default()).await.unwrap();
    let publisher = connected(&amqp_config(&queue, QueueType::Classic)).await;
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    assert_eq!(queue.depth(&queue.name).await, Some(1));
}

#[tokio::test]
async fn queue_of_another_type_is_used() {
    let queue = Queue::new();
    declare(&queue.name, true, FieldTable::default()).await.unwrap();
    let publisher = connected(&amqp_config(&queue, QueueType::Quorum)).await;
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    assert_eq!(queue.depth(&queue.name).await, Some(1));
}

#[tokio::test]
async fn transient_queue_is_refused() {
    let queue = Queue::new();
    declare(&queue.name, false, FieldTable::default()).await.unwrap();
    let config = amqp_config(&queue, QueueType::Classic);
    let publisher = refused(&config, "other arguments").await;
    let error = publisher.publish_ids("c", &[1], SECOND).await.unwrap_err();
    assert!(matches!(error, PublishError::Away(_)), "{error}");
}

#[tokio::test]
async fn each_queue_that_would_drop_messages_is_refused() {
    let expiring = arguments(&[
        ("x-queue-type", AMQPValue::LongString("quorum".into())),
        ("x-message-ttl", AMQPValue::LongLongInt(2_000)),
    ]);
    for suffix in ["", ".dead", ".retry.2s"] {
        let queue = Queue::new();
        declare(&format!("{}{suffix}", queue.name), true, expiring.clone()).await.unwrap();
        refused(&amqp_config(&queue, QueueType::Quorum), "other arguments").await;
    }
}

#[tokio::test]
async fn message_of_the_go_producer_is_delivered() {
    let queue = Queue::new();
    let publisher = connected(&amqp_config(&queue, QueueType::Classic)).await;
    queue.publish_raw(br#"{"ID":42}"#).await;
    let mut consumer = consumer(&publisher, 1);
    let delivery = next(&mut consumer).await;
    assert_eq!(delivery.id().unwrap(), 42);
    assert_eq!(delivery.callback_id(), "");
}

#[tokio::test]
async fn undecodable_body_is_dead_lettered_unchanged() {
    let (queue, _, publisher) = quorum_queue().await;
    queue.publish_raw(b"\xff{not json").await;
    let mut consumer = consumer(&publisher, 1);
    let delivery = next(&mut consumer).await;
    let reason = delivery.id().unwrap_err().to_string();
    delivery.settle(Disposition::DeadLetter { reason }).await;
    let letter = queue.get(&queue.dead()).await.unwrap();
    assert_eq!(letter.delivery.data, b"\xff{not json");
}

#[tokio::test]
async fn deleted_queue_is_never_confirmed_and_declared_again() {
    let (queue, _, publisher) = quorum_queue().await;
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
async fn deleted_queue_is_declared_and_consumed_again() {
    let (queue, _, publisher) = quorum_queue().await;
    let mut consumer = consumer(&publisher, 5);
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
async fn delivery_from_a_deleted_queue_can_still_be_settled() {
    for queue_type in [QueueType::Quorum, QueueType::Classic] {
        let queue = Queue::new();
        let publisher = connected(&amqp_config(&queue, queue_type)).await;
        let mut consumer = consumer(&publisher, 5);
        publisher.publish_ids("c", &[1, 2, 3], SECOND * 5).await.unwrap();
        let delivered = take(&mut consumer, 3).await;
        let mut status = consumer.status();
        assert!(status.borrow_and_update().is_ok());
        let after = tokio::spawn(async move { next(&mut consumer).await.id().unwrap() });
        delete(&queue.name).await;
        timeout(PATIENCE, status.wait_for(Result::is_err)).await.unwrap().unwrap();
        timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
        // These deliveries are the only copies of their messages.
        for (delivery, disposition) in
            delivered.into_iter().zip([Disposition::Ack, retry("x"), dead("x")])
        {
            assert!(!delivery.is_lost(), "{queue_type:?}");
            assert_eq!(delivery.settle(disposition).await, Settled::Done, "{queue_type:?}");
        }
        assert_eq!(queue.depth(&queue.dead()).await, Some(1));
        // The retry is delivered by way of its delay queue.
        assert_eq!(timeout(PATIENCE, after).await.unwrap().unwrap(), 2);
    }
}

#[tokio::test]
async fn publish_without_a_broker_fails_at_once_with_the_reason() {
    let unreachable = format!("amqp://guest:guest@127.0.0.1:{}/%2f", testkit::free_port());
    let config = config_at(&unreachable, "objects", QueueType::Quorum);
    let publisher = refused(&config, "cannot reach").await;
    let started = Instant::now();
    let error = publisher.publish_ids("c", &[1], PATIENCE).await.unwrap_err();
    assert!(
        matches!(&error, PublishError::Away(reason) if reason.contains("cannot reach")),
        "{error}"
    );
    assert!(started.elapsed() < SECOND);
    // An empty batch cannot fail.
    publisher.publish_ids("c", &[], SECOND).await.unwrap();
}

/// A listener instead of a broker.
async fn listener() -> (TcpListener, Config) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let uri = format!("amqp://guest:guest@{}/%2f", listener.local_addr().unwrap());
    (listener, config_at(&uri, "objects", QueueType::Quorum))
}

#[tokio::test]
async fn silent_peer_is_reported_as_not_speaking_amqp() {
    let (_silent, config) = listener().await;
    refused(&config, "does not speak AMQP").await;
}

#[tokio::test]
async fn broker_that_hangs_up_is_retried_with_backoff() {
    let (listener, config) = listener().await;
    let _publisher = Publisher::start(config.open(&Supervisor::default()).unwrap(), "test");
    let (first, _) = timeout(PATIENCE, listener.accept()).await.unwrap().unwrap();
    drop(first);
    let started = Instant::now();
    for _ in 0..8 {
        drop(timeout(PATIENCE, listener.accept()).await.unwrap().unwrap());
    }
    // 100, 200 and 400 ms, then 700 ms each, plus jitter of up to the same length.
    assert!(started.elapsed() > SECOND * 2, "eight more attempts in {:?}", started.elapsed());
}

#[tokio::test]
async fn silent_broker_is_noticed_and_reconnected() {
    let queue = Queue::new();
    let (proxy, config) = through_a_proxy(&queue).await;
    let publisher = connected(&config).await;
    let mut consumer = consumer(&publisher, 5);
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    let held = next(&mut consumer).await;

    proxy.silence();
    let error = publisher.publish_ids("c", &[2], SECOND / 2).await.unwrap_err();
    assert!(matches!(error, PublishError::Timeout(_)), "{error}");
    let mut status = publisher.status();
    // Two heartbeats of 5 s, and the stall limit of 10 s, whichever comes first.
    timeout(PATIENCE * 2, status.wait_for(Result::is_err)).await.unwrap().unwrap();
    proxy.restore();
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    publisher.publish_ids("c", &[3], SECOND * 5).await.unwrap();
    // The consumer's connection may have survived the silence. If not, its delivery in flight is
    // redelivered on a new one.
    let lost = held.settle(Disposition::Ack).await == Settled::Lost;
    let mut ids = Vec::new();
    while !ids.contains(&3) || (lost && !ids.contains(&1)) {
        let delivery = next(&mut consumer).await;
        ids.push(delivery.id().unwrap());
        delivery.settle(Disposition::Ack).await;
    }
}

#[tokio::test]
async fn batch_beyond_the_outstanding_limit_fails_at_once() {
    let queue = Queue::new();
    let (proxy, config) = through_a_proxy(&queue).await;
    let publisher = connected(&config).await;
    proxy.silence();
    let many: Vec<i64> = (0..5_000).collect();
    let first = publisher.publish_ids("first", &many, PATIENCE);
    let second = publisher.publish_ids("second", &many, PATIENCE);
    let (mut first, mut second) = (pin!(first), pin!(second));
    assert!(first.as_mut().now_or_never().is_none() && second.as_mut().now_or_never().is_none());
    let more = publisher.publish_ids("more", &[2], PATIENCE).now_or_never();
    assert!(matches!(more, Some(Err(PublishError::Full(10_000)))), "{more:?}");
    proxy.restore();
    // The silence may have ended the session, and with it the batches.
    for outcome in [first.await, second.await] {
        assert!(matches!(outcome, Ok(()) | Err(PublishError::Away(_))), "{outcome:?}");
    }
    eventually("a batch is accepted again", PATIENCE, async || {
        publisher.publish_ids("more", &[3], PATIENCE).await.ok()
    })
    .await;
}

#[tokio::test]
async fn cancelled_consumer_is_not_mistaken_for_an_idle_one() {
    let (queue, _, publisher) = quorum_queue().await;
    let (_connection, channel) = raw_channel().await;
    let mut consumer = consumer(&publisher, 1);
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    next(&mut consumer).await.settle(Disposition::Ack).await;
    let mut status = consumer.status();
    assert!(status.borrow_and_update().is_ok());
    let waiting = tokio::spawn(async move { next(&mut consumer).await.id().unwrap() });
    channel.queue_delete(queue.name.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_err)).await.unwrap().unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    publisher.publish_ids("c", &[5], SECOND * 5).await.unwrap();
    assert_eq!(waiting.await.unwrap(), 5);
}

/// A header as text.
fn header(properties: &BasicProperties, name: &str) -> Option<String> {
    match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::LongLongInt(number) => Some(number.to_string()),
        other => panic!("unexpected header {name}: {other:?}"),
    }
}

/// The names of the headers, without the one that a quorum queue adds to each delivery.
fn header_names(properties: &BasicProperties) -> Vec<&str> {
    let headers = properties.headers().iter().flat_map(FieldTable::inner);
    headers.map(|(name, _)| name.as_str()).filter(|name| *name != "x-delivery-count").collect()
}

#[tokio::test]
async fn dead_letter_is_persistent_and_has_its_history_in_headers() {
    let (queue, _, publisher) = quorum_queue().await;
    publisher.publish_ids("callback-5", &[7], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    next(&mut consumer).await.settle(retry("no answer")).await;
    next(&mut consumer).await.settle(dead("answered 500")).await;

    let letter = queue.get(&queue.dead()).await.expect("the message should be a dead letter");
    let properties = &letter.delivery.properties;
    assert_eq!(*properties.delivery_mode(), Some(2));
    assert_eq!(properties.correlation_id().as_ref().unwrap().as_str(), "callback-5");
    assert_eq!(properties.content_type().as_ref().unwrap().as_str(), "application/json");
    assert_eq!(header(properties, "lastseen-reason").unwrap(), "answered 500");
    assert_eq!(header(properties, "lastseen-attempts").unwrap(), "2");
    let first = header(properties, "lastseen-first-failed-at").unwrap();
    let last = header(properties, "lastseen-last-failed-at").unwrap();
    assert!(first < last, "{first} {last}");
}

/// Takes and loses the first message of `queue` until the broker gives it up. It closes the channel
/// each time, because RabbitMQ 4.3 does not count a `nack` as a delivery.
async fn exhaust(queue: &Queue) {
    let (connection, _channel) = raw_channel().await;
    eventually("the broker gives up the message", PATIENCE, async || {
        let channel = connection.create_channel().await.unwrap();
        let got = channel.basic_get(queue.name.as_str().into(), BasicGetOptions::default());
        let _ = got.await.unwrap();
        channel.close(200, "lost".into()).await.unwrap();
        queue.depth(&queue.dead()).await.filter(|depth| *depth > 0)
    })
    .await;
}

// Field case 9.1
#[tokio::test]
async fn message_given_up_by_the_broker_can_be_redriven() {
    let (queue, config, publisher) = quorum_queue().await;
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    exhaust(&queue).await;
    let letters = process_all(&config, DeadLetterAction::List).await;
    assert_eq!(letters[0].reason, "delivery_limit (by RabbitMQ)");
    assert_eq!((letters[0].id, letters[0].attempts), (Some(1), 0));

    // Now with an earlier failed attempt of Lastseen.
    process_all(&config, DeadLetterAction::Redrive).await;
    let mut failing = consumer(&publisher, 1);
    next(&mut failing).await.settle(retry("answered 500")).await;
    failing.close().await;
    exhaust(&queue).await;
    let letters = process_all(&config, DeadLetterAction::Redrive).await;
    assert_eq!(letters[0].reason, "delivery_limit (by RabbitMQ), after: answered 500");
    assert_eq!((letters[0].id, letters[0].attempts), (Some(1), 1));
    let message = queue.get(&queue.name).await.unwrap().delivery;
    assert!(header_names(&message.properties).is_empty(), "{message:?}");
}

#[tokio::test]
async fn redriven_copy_is_persistent_and_loses_only_its_history() {
    let headers = arguments(&[
        ("team", AMQPValue::LongString("blue".into())),
        ("lastseen-attempts", AMQPValue::LongLongInt(3)),
        ("lastseen-reason", AMQPValue::LongString("answered 500".into())),
        ("x-somebody", AMQPValue::Boolean(true)),
    ]);
    let properties = BasicProperties::default()
        .with_headers(headers)
        .with_content_type("application/json".into())
        .with_correlation_id("callback-8".into())
        .with_timestamp(1_700_000_000);
    let body = br#"{"ID":42,"Seen":"never"}"#.to_vec();
    let (queue, config) = queue_with_letters([(body.clone(), properties.clone())]).await;
    process_all(&config, DeadLetterAction::Redrive).await;
    let message = queue.get(&queue.name).await.unwrap().delivery;
    assert_eq!(message.data, body);
    assert_eq!(*message.properties.delivery_mode(), Some(2));
    assert_eq!(header_names(&message.properties), ["team"]);
    assert_eq!(message.properties.content_type(), properties.content_type());
    assert_eq!(message.properties.correlation_id(), properties.correlation_id());
    assert_eq!(message.properties.timestamp(), properties.timestamp());
}

#[tokio::test]
async fn undecodable_letter_is_listed_and_redriven_unchanged() {
    let undecodable = (b"\xff{not json".to_vec(), BasicProperties::default());
    let (queue, config) = queue_with_letters([undecodable]).await;
    let by_object = Selection { ids: vec![1], reason: None };
    assert_eq!(process_dead_letters(&config, &by_object, DeadLetterAction::Redrive).await, []);
    let letters = process_all(&config, DeadLetterAction::Redrive).await;
    assert_eq!((letters[0].id, letters[0].reason.as_str()), (None, "unknown"));
    assert_eq!(letters[0].body, b"\xff{not json");
    assert_eq!(queue.get(&queue.name).await.unwrap().delivery.data, b"\xff{not json");
}

#[tokio::test]
async fn inspector_declares_no_missing_queue() {
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    let mut inspector = Inspector::open(&config).await.unwrap();
    let nothing = Depths { ready: 0, delayed: 0, dead: 0 };
    assert_eq!(inspector.depths().await.unwrap(), nothing);
    for action in [DeadLetterAction::List, DeadLetterAction::Redrive, DeadLetterAction::Purge] {
        let found = |letter| panic!("{letter:?}");
        inspector.dead_letters(&Selection::default(), action, found).await.unwrap();
    }
    inspector.close().await;
    for name in [queue.name.clone(), queue.dead(), format!("{}.retry.2s", queue.name)] {
        assert_eq!(queue.depth(&name).await, None, "{name}");
    }
}

/// By default, a quorum queue delivers up to 2,000 unacked messages to one consumer; here it is
/// 5,000.
#[tokio::test]
async fn letters_beyond_one_prefetch_are_processed_in_order() {
    const LETTERS: i64 = 5_300;
    let (queue, config) = queue_with_letters((0..LETTERS).map(letter)).await;
    let all: Vec<i64> = (0..LETTERS).collect();
    let (even, odd): (Vec<i64>, Vec<i64>) = all.iter().partition(|id| *id % 2 == 0);
    for _ in 0..2 {
        let letters = process_all(&config, DeadLetterAction::List).await;
        assert!(ids(&letters) == all, "listing should keep the order");
    }
    let selection = Selection { ids: even.clone(), reason: None };
    assert!(ids(&process_dead_letters(&config, &selection, DeadLetterAction::Purge).await) == even);
    assert_eq!(queue.depth(&queue.dead()).await, u32::try_from(odd.len()).ok());
    assert!(ids(&process_all(&config, DeadLetterAction::Redrive).await) == odd);
    assert_eq!(queue.depth(&queue.dead()).await, Some(0));
    let publisher = connected(&config).await;
    let mut consumer = consumer(&publisher, 500);
    assert!(ack_next(&mut consumer, odd.len()).await == odd);
    assert_eq!(queue.depth(&queue.name).await, Some(0));
}

#[tokio::test]
async fn redrive_to_a_refused_queue_leaves_the_letters() {
    let (queue, config) = queue_with_letters([letter(1)]).await;
    delete(&queue.name).await;
    declare(&queue.name, false, FieldTable::default()).await.unwrap();
    let mut inspector = Inspector::open(&config).await.unwrap();
    let (all, redriven) = (Selection::default(), |letter| panic!("{letter:?}"));
    let redriving = inspector.dead_letters(&all, DeadLetterAction::Redrive, redriven);
    let error = redriving.await.unwrap_err();
    assert!(
        matches!(&error, InspectError::Away(reason) if reason.contains("other arguments")),
        "{error}"
    );
    assert_eq!(queue.depth(&queue.dead()).await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_without_a_confirmed_copy_stay() {
    const LETTERS: u32 = 700;
    let (queue, config) = queue_with_letters((0..i64::from(LETTERS)).map(letter)).await;
    let mut inspector = Inspector::open(&config).await.unwrap();
    let mut redriven = 0;
    // Delete the main queue after the first batch.
    let on_done = |_| {
        redriven += 1;
        if redriven == 1 {
            block_in_place(|| Handle::current().block_on(delete(&queue.name)));
        }
    };
    let all = Selection::default();
    let error = inspector.dead_letters(&all, DeadLetterAction::Redrive, on_done).await.unwrap_err();
    assert!(matches!(error, InspectError::Away(_)), "{error}");
    assert!((1..LETTERS).contains(&redriven), "{redriven}");
    assert_eq!(queue.depth(&queue.dead()).await, Some(LETTERS - redriven));
}

#[tokio::test]
async fn dead_letters_have_a_high_delivery_limit() {
    let (queue, _) = queue_with_letters([]).await;
    // With its default limit, RabbitMQ 4 drops a letter that was listed 20 times. Only a
    // declaration can show the limit.
    let arguments = arguments(&[
        ("x-queue-type", AMQPValue::LongString("quorum".into())),
        ("x-delivery-limit", AMQPValue::LongInt(1_000_000)),
    ]);
    declare(&queue.dead(), true, arguments).await.unwrap();
}

#[tokio::test]
async fn inspector_fails_on_an_absent_or_silent_broker() {
    let queue = Queue::new();
    let absent = format!("amqp://127.0.0.1:{}", testkit::free_port());
    let config = config_at(&absent, &queue.name, QueueType::Quorum);
    let error = Inspector::open(&config).await.err().unwrap();
    assert!(
        matches!(&error, InspectError::Away(reason) if reason.contains("cannot reach")),
        "{error}"
    );

    let (proxy, config) = through_a_proxy(&queue).await;
    let mut inspector = Inspector::open(&config).await.unwrap();
    proxy.silence();
    let error = timeout(PATIENCE, inspector.depths()).await.unwrap().unwrap_err();
    assert!(matches!(error, InspectError::Away(_)), "{error}");
    let (all, ignored) = (Selection::default(), |letter| panic!("{letter:?}"));
    let listed = inspector.dead_letters(&all, DeadLetterAction::List, ignored);
    let error = timeout(PATIENCE, listed).await.unwrap().unwrap_err();
    assert!(matches!(error, InspectError::Away(_)), "{error}");
}

#[tokio::test]
async fn consumer_dropped_while_connecting_loses_no_message() {
    let (_queue, _, publisher) = quorum_queue().await;
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    // A connection takes about the same number of polls each time, so each point of interruption is
    // covered.
    for _ in 0..10 {
        let mut polls = 1;
        let taken = async {
            while poll_times(polls, consumer(&publisher, 1).next()).await.is_none() {
                polls += 1;
            }
        };
        timeout(PATIENCE, taken).await.expect("a dropped consumer should not keep the message");
    }
    assert_eq!(ack_next(&mut consumer(&publisher, 1), 1).await, [1]);
}
