//! What is RabbitMQ's alone.

use std::pin::pin;
use std::time::Instant;

use broker::{
    Config, Depths, Disposition, InspectError, Inspector, PublishError, Publisher, QueueType,
    Selection, Settled, Treatment,
};
use futures_util::FutureExt as _;
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties};
use testbed::{Proxy, Queue, eventually};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::block_in_place;
use tokio::time::timeout;

use crate::test_queue::{
    PATIENCE, SECOND, amqp_config, connected, consumer, dead, drain, for_steps, ids, next, retry,
    treat,
};

async fn raw_channel() -> (Connection, Channel) {
    let properties = ConnectionProperties::default();
    let uri = testbed::amqp_uri().parse().unwrap();
    let connection = Connection::connect_uri(uri, properties).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

/// Publishes messages with any bodies and properties to any queue, and waits until the broker has
/// them.
async fn publish_raw(queue: &str, messages: impl IntoIterator<Item = (Vec<u8>, BasicProperties)>) {
    let (_connection, channel) = raw_channel().await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let mut confirms = Vec::new();
    for (body, properties) in messages {
        let published =
            channel.basic_publish("".into(), queue.into(), mandatory, &body, properties);
        confirms.push(published.await.unwrap());
    }
    for confirm in confirms {
        assert!(matches!(confirm.await.unwrap(), Confirmation::Ack(None)));
    }
}

/// The broker behind a proxy.
async fn through_a_proxy(queue: &Queue) -> (Proxy, Config) {
    let uri = testbed::amqp_uri();
    let target = uri.rsplit('@').next().unwrap().split('/').next().unwrap().to_owned();
    let proxy = Proxy::start(target.clone()).await;
    let amqp_uri = uri.replace(&target, &proxy.addr().to_string()).parse().unwrap();
    let config = Config { amqp_uri, ..amqp_config(queue, QueueType::Quorum) };
    (proxy, config)
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
async fn messages_are_persistent_and_carry_when_they_were_published() {
    let queue = Queue::new();
    let publisher = connected(&amqp_config(&queue, QueueType::Quorum)).await;
    publisher.publish_ids("c", &[42], SECOND * 5).await.unwrap();
    let message = queue.get(&queue.name).await.unwrap().delivery;
    assert_eq!(message.data, br#"{"id":42}"#);
    assert_eq!(*message.properties.delivery_mode(), Some(2));
    assert!(message.properties.timestamp().is_some());
}

#[tokio::test]
async fn a_classic_queue_is_declared_as_the_go_services_declare_it() {
    let queue = Queue::new();
    // Ours first: theirs must not be refused.
    let publisher = connected(&amqp_config(&queue, QueueType::Classic)).await;
    declare(&queue.name, true, FieldTable::default()).await.unwrap();
    // Theirs first: ours takes it as its own, with nothing to warn of.
    drop(publisher);
    delete(&queue.name).await;
    declare(&queue.name, true, FieldTable::default()).await.unwrap();
    let publisher = connected(&amqp_config(&queue, QueueType::Classic)).await;
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    assert_eq!(queue.depth(&queue.name).await, Some(1));
}

#[tokio::test]
async fn a_queue_of_another_type_is_used_as_it_is() {
    let queue = Queue::new();
    declare(&queue.name, true, FieldTable::default()).await.unwrap();
    let publisher = connected(&amqp_config(&queue, QueueType::Quorum)).await;
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    assert_eq!(queue.depth(&queue.name).await, Some(1));
}

#[tokio::test]
async fn a_queue_that_would_lose_its_messages_is_refused() {
    let queue = Queue::new();
    declare(&queue.name, false, FieldTable::default()).await.unwrap();
    let publisher = Publisher::start(&amqp_config(&queue, QueueType::Classic), "test").unwrap();
    let mut status = publisher.status();
    let refused = status
        .wait_for(|status| status.as_ref().is_err_and(|reason| reason.contains("other arguments")));
    timeout(PATIENCE, refused).await.unwrap().unwrap();
    let error = publisher.publish_ids("c", &[1], SECOND).await.unwrap_err();
    assert!(matches!(error, PublishError::Away(_)), "{error}");
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
        let publisher = Publisher::start(&amqp_config(&queue, QueueType::Quorum), "test").unwrap();
        let mut status = publisher.status();
        let refused = status.wait_for(|status| {
            status.as_ref().is_err_and(|reason| reason.contains("other arguments"))
        });
        timeout(PATIENCE, refused).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_message_of_the_go_producer_is_delivered() {
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Classic);
    let publisher = connected(&config).await;
    queue.publish_raw(br#"{"ID":42}"#).await;
    let mut consumer = consumer(&publisher, 1);
    let delivery = next(&mut consumer).await;
    assert_eq!(delivery.id().unwrap(), 42);
    assert_eq!(delivery.callback_id(), "");
}

#[tokio::test]
async fn a_body_without_an_id_is_delivered_as_an_error_and_kept_whole() {
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    let publisher = connected(&config).await;
    queue.publish_raw(b"\xff{not json").await;
    let mut consumer = consumer(&publisher, 1);
    let delivery = next(&mut consumer).await;
    let reason = delivery.id().unwrap_err().to_string();
    delivery.settle(Disposition::DeadLetter { reason }).await;
    let letter = queue.get(&queue.dead()).await.unwrap();
    assert_eq!(letter.delivery.data, b"\xff{not json");
}

#[tokio::test]
async fn a_deleted_queue_is_never_confirmed_and_soon_there_again() {
    let queue = Queue::new();
    let publisher = connected(&amqp_config(&queue, QueueType::Quorum)).await;
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
    let config = amqp_config(&queue, QueueType::Quorum);
    let publisher = connected(&config).await;
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
async fn what_was_delivered_before_its_queue_was_deleted_is_settled_all_the_same() {
    for queue_type in [QueueType::Quorum, QueueType::Classic] {
        let queue = Queue::new();
        let publisher = connected(&amqp_config(&queue, queue_type)).await;
        let mut consumer = consumer(&publisher, 5);
        publisher.publish_ids("c", &[1, 2, 3], SECOND * 5).await.unwrap();
        let mut delivered = Vec::new();
        for _ in 0..3 {
            delivered.push(next(&mut consumer).await);
        }
        let mut status = consumer.status();
        assert!(status.borrow_and_update().is_ok());
        let after = tokio::spawn(async move { next(&mut consumer).await.id().unwrap() });
        delete(&queue.name).await;
        timeout(PATIENCE, status.wait_for(Result::is_err)).await.unwrap().unwrap();
        timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
        // They are all that there is of these messages.
        for (delivery, disposition) in
            delivered.into_iter().zip([Disposition::Ack, retry("x"), dead("x")])
        {
            assert!(!delivery.is_lost(), "{queue_type:?}");
            assert_eq!(delivery.settle(disposition).await, Settled::Done, "{queue_type:?}");
        }
        assert_eq!(queue.depth(&queue.dead()).await, Some(1));
        // The one to be tried again, on the way by its delay queue.
        assert_eq!(timeout(PATIENCE, after).await.unwrap().unwrap(), 2);
    }
}

#[tokio::test]
async fn without_a_broker_a_publish_fails_at_once_and_says_why() {
    let queue = Queue::new();
    let nowhere = format!("amqp://guest:guest@127.0.0.1:{}/%2f", testbed::free_port());
    let amqp_uri = nowhere.parse().unwrap();
    let config = Config { amqp_uri, ..amqp_config(&queue, QueueType::Quorum) };
    let publisher = Publisher::start(&config, "test").unwrap();
    let mut status = publisher.status();
    let refused = status.wait_for(|s| s.as_ref().is_err_and(|s| s.contains("cannot reach")));
    timeout(PATIENCE, refused).await.unwrap().unwrap();
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
    let config = Config { amqp_uri, ..amqp_config(&queue, QueueType::Quorum) };
    let publisher = Publisher::start(&config, "test").unwrap();
    let mut status = publisher.status();
    let silent = status.wait_for(|s| s.as_ref().is_err_and(|s| s.contains("does not speak AMQP")));
    timeout(PATIENCE, silent).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_broker_that_hangs_up_is_tried_again_after_pauses_and_not_at_once() {
    let rude = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = rude.local_addr().unwrap();
    let amqp_uri = format!("amqp://guest:guest@{address}/%2f").parse().unwrap();
    let config = Config { amqp_uri, ..amqp_config(&Queue::new(), QueueType::Quorum) };
    let _publisher = Publisher::start(&config, "test").unwrap();
    let (first, _) = timeout(PATIENCE, rude.accept()).await.unwrap().unwrap();
    drop(first);
    let started = Instant::now();
    for _ in 0..8 {
        drop(timeout(PATIENCE, rude.accept()).await.unwrap().unwrap());
    }
    // 100, 200 and 400 ms, then 700 each, and up to as much again.
    assert!(started.elapsed() > SECOND * 2, "eight more attempts in {:?}", started.elapsed());
}

#[tokio::test]
async fn a_broker_that_falls_silent_is_noticed_and_found_again() {
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
async fn what_is_more_than_the_broker_may_have_to_confirm_is_turned_away_at_once() {
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
    // The silence may have ended the session; then they are told so.
    for told in [first.await, second.await] {
        assert!(matches!(told, Ok(()) | Err(PublishError::Away(_))), "{told:?}");
    }
    eventually("there is room again", PATIENCE, async || {
        publisher.publish_ids("more", &[3], PATIENCE).await.ok()
    })
    .await;
}

#[tokio::test]
async fn a_cancelled_consumer_is_not_mistaken_for_an_idle_one() {
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    let publisher = connected(&config).await;
    let (_connection, channel) = raw_channel().await;
    let mut ours = consumer(&publisher, 1);
    publisher.publish_ids("c", &[1], SECOND * 5).await.unwrap();
    next(&mut ours).await.settle(Disposition::Ack).await;
    let mut status = ours.status();
    assert!(status.borrow_and_update().is_ok());
    let waiting = tokio::spawn(async move { next(&mut ours).await.id().unwrap() });
    channel.queue_delete(queue.name.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_err)).await.unwrap().unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    publisher.publish_ids("c", &[5], SECOND * 5).await.unwrap();
    assert_eq!(waiting.await.unwrap(), 5);
}

/// A header as the text that a person would see.
fn header(properties: &BasicProperties, name: &str) -> Option<String> {
    match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        AMQPValue::LongLongInt(number) => Some(number.to_string()),
        other => panic!("unexpected header {name}: {other:?}"),
    }
}

/// The names of the headers, but for the one that a quorum queue adds to each delivery.
fn header_names(properties: &BasicProperties) -> Vec<&str> {
    let headers = properties.headers().iter().flat_map(FieldTable::inner);
    headers.map(|(name, _)| name.as_str()).filter(|name| *name != "x-delivery-count").collect()
}

#[tokio::test]
async fn a_dead_letter_is_persistent_and_tells_its_history_in_headers() {
    let queue = Queue::new();
    let publisher = connected(&amqp_config(&queue, QueueType::Quorum)).await;
    publisher.publish_ids("callback-5", &[7], PATIENCE).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    next(&mut consumer).await.settle(retry("no answer")).await;
    next(&mut consumer).await.settle(dead("answered 500")).await;

    let letter = queue.get(&queue.dead()).await.expect("it should be among the dead letters");
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

/// Has the first message of `queue` delivered and lost until the broker gives it up. Each time its channel
/// ends with it: to RabbitMQ 4.3 a `nack` is no delivery.
async fn exhaust(queue: &Queue) {
    let (connection, _channel) = raw_channel().await;
    eventually("the broker gives it up", PATIENCE, async || {
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
async fn a_message_that_the_broker_gives_up_by_itself_says_so_and_can_be_redriven() {
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    let publisher = connected(&config).await;
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    exhaust(&queue).await;
    let letters = treat(&config, &Selection::default(), Treatment::Look).await;
    assert_eq!(letters[0].reason, "delivery_limit (by RabbitMQ)");
    assert_eq!((letters[0].id, letters[0].attempts), (Some(1), 0));

    // With an attempt of ours that had failed before.
    treat(&config, &Selection::default(), Treatment::Redrive).await;
    let mut failing = consumer(&publisher, 1);
    next(&mut failing).await.settle(retry("answered 500")).await;
    failing.close().await;
    exhaust(&queue).await;
    let letters = treat(&config, &Selection::default(), Treatment::Redrive).await;
    assert_eq!(letters[0].reason, "delivery_limit (by RabbitMQ), after: answered 500");
    assert_eq!((letters[0].id, letters[0].attempts), (Some(1), 1));
    let message = queue.get(&queue.name).await.unwrap().delivery;
    assert!(header_names(&message.properties).is_empty(), "{message:?}");
}

#[tokio::test]
async fn a_redriven_copy_is_persistent_and_keeps_all_but_its_history() {
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    connected(&config).await.close().await;
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
    publish_raw(&queue.dead(), [(body.clone(), properties.clone())]).await;
    treat(&config, &Selection::default(), Treatment::Redrive).await;
    let message = queue.get(&queue.name).await.unwrap().delivery;
    assert_eq!(message.data, body);
    assert_eq!(*message.properties.delivery_mode(), Some(2));
    assert_eq!(header_names(&message.properties), ["team"]);
    assert_eq!(message.properties.content_type(), properties.content_type());
    assert_eq!(message.properties.correlation_id(), properties.correlation_id());
    assert_eq!(message.properties.timestamp(), properties.timestamp());
}

#[tokio::test]
async fn a_letter_that_names_no_object_is_shown_and_redriven_as_it_is() {
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    connected(&config).await.close().await;
    publish_raw(&queue.dead(), [(b"\xff{not json".to_vec(), BasicProperties::default())]).await;
    let by_object = Selection { ids: vec![1], reason: None };
    assert_eq!(treat(&config, &by_object, Treatment::Redrive).await, []);
    let letters = treat(&config, &Selection::default(), Treatment::Redrive).await;
    assert_eq!((letters[0].id, letters[0].reason.as_str()), (None, "unknown"));
    assert_eq!(letters[0].body, b"\xff{not json");
    assert_eq!(queue.get(&queue.name).await.unwrap().delivery.data, b"\xff{not json");
}

#[tokio::test]
async fn a_look_at_what_does_not_exist_finds_nothing_and_declares_nothing() {
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    let mut inspector = Inspector::open(&config).await.unwrap();
    let nothing = Depths { ready: 0, delayed: 0, dead: 0 };
    assert_eq!(inspector.depths().await.unwrap(), nothing);
    for treatment in [Treatment::Look, Treatment::Redrive, Treatment::Purge] {
        let found = |letter| panic!("{letter:?}");
        inspector.dead_letters(&Selection::default(), treatment, found).await.unwrap();
    }
    inspector.close().await;
    for name in [queue.name.clone(), queue.dead(), format!("{}.retry.2s", queue.name)] {
        assert_eq!(queue.depth(&name).await, None, "{name}");
    }
}

/// A quorum queue gives one consumer 2,000 unacked messages by default, ours allow it 5,000.
#[tokio::test]
async fn more_letters_than_a_consumer_may_hold_are_treated_one_by_one_and_keep_their_order() {
    const LETTERS: i64 = 5_300;
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    connected(&config).await.close().await;
    let letter = |id| (format!("{{\"id\":{id}}}").into_bytes(), BasicProperties::default());
    publish_raw(&queue.dead(), (0..LETTERS).map(letter)).await;
    let all: Vec<i64> = (0..LETTERS).collect();
    let (even, odd): (Vec<i64>, Vec<i64>) = all.iter().partition(|id| *id % 2 == 0);
    for _ in 0..2 {
        let letters = treat(&config, &Selection::default(), Treatment::Look).await;
        assert!(ids(&letters) == all, "a look keeps the order");
    }
    let selection = Selection { ids: even.clone(), reason: None };
    assert!(ids(&treat(&config, &selection, Treatment::Purge).await) == even);
    assert_eq!(queue.depth(&queue.dead()).await, u32::try_from(odd.len()).ok());
    assert!(ids(&treat(&config, &Selection::default(), Treatment::Redrive).await) == odd);
    assert_eq!(queue.depth(&queue.dead()).await, Some(0));
    let publisher = connected(&config).await;
    let mut consumer = consumer(&publisher, 500);
    assert!(drain(&mut consumer, odd.len()).await == odd);
    assert_eq!(queue.depth(&queue.name).await, Some(0));
}

#[tokio::test]
async fn a_redrive_to_a_queue_that_is_refused_leaves_the_letters_where_they_are() {
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    connected(&config).await.close().await;
    publish_raw(&queue.dead(), [(b"{\"id\":1}".to_vec(), BasicProperties::default())]).await;
    delete(&queue.name).await;
    declare(&queue.name, false, FieldTable::default()).await.unwrap();
    let mut inspector = Inspector::open(&config).await.unwrap();
    let redriven = |letter| panic!("{letter:?}");
    let error = inspector
        .dead_letters(&Selection::default(), Treatment::Redrive, redriven)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, InspectError::Away(why) if why.contains("other arguments")),
        "{error}"
    );
    assert_eq!(queue.depth(&queue.dead()).await, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn letters_whose_copies_the_broker_does_not_take_stay_where_they_are() {
    const LETTERS: u32 = 700;
    let queue = Queue::new();
    let config = amqp_config(&queue, QueueType::Quorum);
    connected(&config).await.close().await;
    let letter = |id| (format!("{{\"id\":{id}}}").into_bytes(), BasicProperties::default());
    publish_raw(&queue.dead(), (0..LETTERS).map(letter)).await;
    let mut inspector = Inspector::open(&config).await.unwrap();
    let mut redriven = 0;
    // The main queue goes away after the first batch.
    let treated = |_| {
        redriven += 1;
        if redriven == 1 {
            block_in_place(|| Handle::current().block_on(delete(&queue.name)));
        }
    };
    let all = Selection::default();
    let error = inspector.dead_letters(&all, Treatment::Redrive, treated).await.unwrap_err();
    assert!(matches!(error, InspectError::Away(_)), "{error}");
    assert!((1..LETTERS).contains(&redriven), "{redriven}");
    assert_eq!(queue.depth(&queue.dead()).await, Some(LETTERS - redriven));
}

#[tokio::test]
async fn looks_do_not_use_up_the_dead_letters() {
    let queue = Queue::new();
    connected(&amqp_config(&queue, QueueType::Quorum)).await.close().await;
    // RabbitMQ 4 would drop a letter after 20 looks; only a declaration tells whether it would.
    let arguments = arguments(&[
        ("x-queue-type", AMQPValue::LongString("quorum".into())),
        ("x-delivery-limit", AMQPValue::LongInt(1_000_000)),
    ]);
    declare(&queue.dead(), true, arguments).await.unwrap();
}

#[tokio::test]
async fn an_inspector_is_told_of_a_broker_that_is_away_and_does_not_wait_for_one_that_falls_silent()
{
    let queue = Queue::new();
    let amqp_uri = format!("amqp://127.0.0.1:{}", testbed::free_port()).parse().unwrap();
    let config = Config { amqp_uri, ..amqp_config(&queue, QueueType::Quorum) };
    let error = Inspector::open(&config).await.err().unwrap();
    assert!(matches!(&error, InspectError::Away(why) if why.contains("cannot reach")), "{error}");

    let (proxy, config) = through_a_proxy(&queue).await;
    let mut inspector = Inspector::open(&config).await.unwrap();
    proxy.silence();
    let error = timeout(PATIENCE, inspector.depths()).await.unwrap().unwrap_err();
    assert!(matches!(error, InspectError::Away(_)), "{error}");
    let ignored = |letter| panic!("{letter:?}");
    let all = Selection::default();
    let looked = inspector.dead_letters(&all, Treatment::Look, ignored);
    let error = timeout(PATIENCE, looked).await.unwrap().unwrap_err();
    assert!(matches!(error, InspectError::Away(_)), "{error}");
}

#[tokio::test]
async fn a_consumer_that_is_dropped_while_it_connects_takes_nothing_with_it() {
    let queue = Queue::new();
    let publisher = connected(&amqp_config(&queue, QueueType::Quorum)).await;
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    // It takes about as many steps each time, so that it is dropped once or more at each of them.
    for _ in 0..10 {
        let mut steps = 1;
        let taken = async {
            while for_steps(steps, consumer(&publisher, 1).next()).await.is_none() {
                steps += 1;
            }
        };
        timeout(PATIENCE, taken).await.expect("one of those that were dropped has it");
    }
    assert_eq!(drain(&mut consumer(&publisher, 1), 1).await, [1]);
}
