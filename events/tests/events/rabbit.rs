use std::path::Path;

use amqp::Access;
use events::{Emitter, Exchange, Kind, Subscriber};
use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ExchangeDeleteOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection};
use testbed::{Proxy, Queue, RabbitNode, eventually, free_port};
use tokio::time::timeout;

use crate::{PATIENCE, hears, is_told_it_missed, objects};

const EVENTS: &str = ".events";

fn exchange_at(uri: &str, queue: &str) -> Exchange {
    Exchange::on(Access { uri: uri.parse().unwrap(), authorities: None }, queue)
}

fn exchange(queue: &Queue) -> Exchange {
    exchange_at(&testbed::amqp_uri(), &queue.name)
}

/// An emitter that is connected.
async fn emitter(exchange: &Exchange) -> Emitter {
    let emitter = Emitter::start(exchange, "test emitter");
    let mut status = emitter.status().unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    emitter
}

/// A subscriber that is subscribed.
async fn subscriber(exchange: &Exchange) -> Subscriber {
    let mut subscriber = Subscriber::new(exchange, "test subscriber");
    is_told_it_missed(&mut subscriber).await;
    subscriber
}

/// A way to the shared broker that can be cut.
async fn proxied(queue: &Queue) -> (Proxy, Exchange) {
    let uri = testbed::amqp_uri();
    let target = uri.rsplit('@').next().unwrap().split('/').next().unwrap().to_owned();
    let proxy = Proxy::start(target.clone()).await;
    let uri = uri.replace(&target, &proxy.addr().to_string());
    let exchange = exchange_at(&uri, &queue.name);
    (proxy, exchange)
}

async fn channel() -> (Connection, Channel) {
    let connection = testbed::connect(&testbed::amqp_uri()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

#[tokio::test]
async fn what_is_told_is_heard_by_each_subscriber_in_its_order() {
    let queue = Queue::new();
    let exchange = exchange(&queue);
    let emitter = emitter(&exchange).await;
    let mut subscribers = [subscriber(&exchange).await, subscriber(&exchange).await];
    emitter.tell(Kind::Online, objects(1..=3).into_iter());
    emitter.tell(Kind::Seen, objects([3]).into_iter());
    emitter.tell(Kind::Gone, objects([i64::MIN, i64::MAX]).into_iter());
    for subscriber in &mut subscribers {
        hears(subscriber, Kind::Online, 1..=3).await;
        hears(subscriber, Kind::Seen, [3]).await;
        hears(subscriber, Kind::Gone, [i64::MIN, i64::MAX]).await;
    }
}

#[tokio::test]
async fn a_queue_of_ones_own_gets_the_documented_format_in_messages_of_a_bounded_size() {
    let queue = Queue::new();
    let emitter = emitter(&exchange(&queue)).await;
    let (_connection, channel) = channel().await;
    let name = format!("{}.other", queue.name);
    let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
    let none = FieldTable::default;
    channel.queue_declare(name.as_str().into(), exclusive, none()).await.unwrap();
    let (own, topics) = (name.as_str().into(), format!("{}{EVENTS}", queue.name).into());
    let bind = QueueBindOptions::default();
    channel.queue_bind(own, topics, "online".into(), bind, none()).await.unwrap();

    emitter.tell(Kind::Gone, objects([9]).into_iter());
    emitter.tell(Kind::Online, objects(1..=2_001).into_iter());
    let mut ids = Vec::new();
    for sequence in 2..=4 {
        let message = eventually("a message comes", PATIENCE, async || {
            let options = BasicGetOptions { no_ack: true };
            channel.basic_get(name.as_str().into(), options).await.unwrap()
        })
        .await;
        assert_eq!(message.routing_key.as_str(), "online");
        let content_type = message.properties.content_type().as_ref().unwrap();
        assert_eq!(content_type.as_str(), "application/json");
        let body: serde_json::Value = serde_json::from_slice(&message.data).unwrap();
        assert_eq!((&body["version"], &body["sequence"]), (&2.into(), &sequence.into()));
        let told = body["objects"].as_array().unwrap();
        assert!(told.len() <= 1_000);
        assert_eq!(told[0]["last_seen"], "2023-11-14T22:13:20.123456Z");
        ids.extend(
            told.iter().map(|object| object["id"].as_str().unwrap().parse::<i64>().unwrap()),
        );
    }
    assert_eq!(ids, (1..=2_001).collect::<Vec<_>>());
}

#[tokio::test]
async fn what_is_told_while_the_broker_is_away_is_dropped_and_known_to_be_as_soon_as_it_is_back() {
    let queue = Queue::new();
    let mut subscriber = subscriber(&exchange(&queue)).await;
    let (proxy, exchange) = proxied(&queue).await;
    let emitter = emitter(&exchange).await;
    emitter.tell(Kind::Online, objects([1]).into_iter());
    hears(&mut subscriber, Kind::Online, [1]).await;

    proxy.cut();
    let mut status = emitter.status().unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_err)).await.unwrap().unwrap();
    // Far more than it keeps; none of this waits.
    for id in 0..100_000 {
        emitter.tell(Kind::Seen, objects([id]).into_iter());
    }
    // Told by nothing but the numbers, and nothing more is told.
    proxy.restore();
    let why = is_told_it_missed(&mut subscriber).await;
    assert!(why.contains("are missing"), "{why}");

    emitter.tell(Kind::Gone, objects([2]).into_iter());
    hears(&mut subscriber, Kind::Gone, [2]).await;
}

#[tokio::test]
async fn without_any_broker_telling_and_ending_take_no_time() {
    let nowhere = format!("amqp://127.0.0.1:{}", free_port());
    let emitter = Emitter::start(&exchange_at(&nowhere, "objects"), "test");
    for id in 0..100_000 {
        emitter.tell(Kind::Seen, objects([id]).into_iter());
    }
    assert!(emitter.status().unwrap().borrow().is_err());
    timeout(PATIENCE, emitter.close()).await.unwrap();
}

#[tokio::test]
async fn both_sides_heal_when_the_broker_was_restarted() {
    let mut node = RabbitNode::start().await;
    let exchange = exchange_at(&node.amqp_uri(), "objects");
    let emitter = emitter(&exchange).await;
    let mut subscriber = subscriber(&exchange).await;
    node.restart().await;
    is_told_it_missed(&mut subscriber).await;
    let mut status = emitter.status().unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    emitter.tell(Kind::Online, objects([1]).into_iter());
    // The number may tell that something was missed before, and need not.
    match crate::next(&mut subscriber).await {
        events::Notice::Missed(_) => hears(&mut subscriber, Kind::Online, [1]).await,
        heard @ events::Notice::Committed(..) => {
            assert_eq!(heard, events::Notice::Committed(Kind::Online, objects([1])));
        }
    }
}

#[tokio::test]
async fn the_services_user_may_tell_and_hear() {
    let node = RabbitNode::start().await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/rabbitmq-user");
    let environment = [
        ("RABBITMQ_SERVICES_USER", "services"),
        ("RABBITMQ_SERVICES_PASSWORD", "secret"),
        ("QUEUE_NAME", "team.objects"),
    ];
    node.run_script(Path::new(script), &environment).await;
    let uri = node.amqp_uri().replace("guest:guest@", "services:secret@");
    let exchange = exchange_at(&uri, "team.objects");
    let emitter = emitter(&exchange).await;
    let mut subscriber = subscriber(&exchange).await;
    emitter.tell(Kind::Online, objects([1]).into_iter());
    hears(&mut subscriber, Kind::Online, [1]).await;
    // The dot is no wildcard in the rights.
    let others = Emitter::start(&exchange_at(&uri, "teamXobjects"), "test");
    eventually("another exchange is refused", PATIENCE, async || {
        let status = others.status().unwrap().borrow().clone();
        status.err().filter(|reason| reason.contains("ACCESS_REFUSED"))
    })
    .await;
}

#[tokio::test]
async fn an_exchange_that_was_deleted_is_made_again_and_heard_again() {
    let queue = Queue::new();
    let exchange = exchange(&queue);
    let emitter = emitter(&exchange).await;
    let mut subscriber = subscriber(&exchange).await;
    let (_connection, channel) = channel().await;
    let name = format!("{}{EVENTS}", queue.name);
    channel.exchange_delete(name.into(), ExchangeDeleteOptions::default()).await.unwrap();
    let teller = tokio::spawn(async move {
        loop {
            emitter.tell(Kind::Seen, objects([1]).into_iter());
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    });
    is_told_it_missed(&mut subscriber).await;
    hears(&mut subscriber, Kind::Seen, [1]).await;
    teller.abort();
}

#[tokio::test]
async fn what_cannot_be_read_counts_as_missed_and_an_unknown_kind_is_passed_over() {
    let queue = Queue::new();
    let mut subscriber = subscriber(&exchange(&queue)).await;
    let (_connection, channel) = channel().await;
    let publish = async |key: &str, body: String| {
        let exchange = format!("{}{EVENTS}", queue.name).into();
        let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
        let bytes = body.as_bytes();
        channel.basic_publish(exchange, key.into(), options, bytes, properties).await.unwrap();
    };
    let body = |sequence: u64| {
        let source = "019ab3c5-5d7e-7c41-9a35-0f2d1f6c2b11";
        let object = r#"{"id":1,"last_seen":"2023-11-14T22:13:20.123456Z"}"#;
        format!(r#"{{"version":1,"source":"{source}","sequence":{sequence},"objects":[{object}]}}"#)
    };
    publish("seen", "nonsense".to_owned()).await;
    publish("seen", r#"{"version":3}"#.to_owned()).await;
    for _ in 0..2 {
        let why = is_told_it_missed(&mut subscriber).await;
        assert!(why.contains("cannot be read"), "{why}");
    }
    publish("online", body(1)).await;
    publish("renamed", body(2)).await;
    publish("seen", body(3)).await;
    hears(&mut subscriber, Kind::Online, [1]).await;
    hears(&mut subscriber, Kind::Seen, [1]).await;
}

// Field case 4.5
#[tokio::test]
async fn one_missing_number_is_missed_although_no_message_follows() {
    let queue = Queue::new();
    let exchange = exchange(&queue);
    let emitter = emitter(&exchange).await;
    let mut subscriber = subscriber(&exchange).await;
    emitter.tell(Kind::Online, objects([1]).into_iter());
    hears(&mut subscriber, Kind::Online, [1]).await;
    emitter.leave_gap("for a test");
    let why = is_told_it_missed(&mut subscriber).await;
    assert!(why.contains("are missing"), "{why}");
    emitter.tell(Kind::Online, objects([2]).into_iter());
    hears(&mut subscriber, Kind::Online, [2]).await;
}
