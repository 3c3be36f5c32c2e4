use lapin::options::{
    BasicGetOptions, BasicPublishOptions, ExchangeDeleteOptions, QueueBindOptions,
    QueueDeclareOptions,
};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection};
use messaging::amqp::Access;
use messaging::events::{Emitter, Exchange, GroupChange, Kind, Notification, Subscriber};
use runtime::Supervisor;
use testkit::{Proxy, Queue, RabbitNode, amqp_uri, eventually, free_port};
use tokio::time::timeout;

use crate::events::{
    PATIENCE, expect_event, expect_missed, given_up, group_changes, next, objects,
};
use crate::{channel, make_user};

const EVENTS: &str = ".events";

fn exchange_at(uri: &str, queue: &str) -> Exchange {
    Exchange::on_rabbitmq(Access { uri: uri.parse().unwrap(), authorities: None }, queue)
}

fn exchange(queue: &Queue) -> Exchange {
    exchange_at(&amqp_uri(), &queue.name)
}

/// Starts an emitter and waits until it is connected.
async fn emitter(exchange: &Exchange) -> Emitter {
    let emitter = Emitter::start(exchange, "test emitter", &Supervisor::default());
    let mut status = emitter.status().unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    emitter
}

/// Creates a subscriber and waits until it is subscribed.
async fn subscriber(exchange: &Exchange) -> Subscriber {
    let mut subscriber = Subscriber::new(exchange, "test subscriber");
    expect_missed(&mut subscriber).await;
    subscriber
}

/// The shared broker behind a proxy.
async fn proxied(queue: &Queue) -> (Proxy, Exchange) {
    let (proxy, uri) = Proxy::before(&amqp_uri()).await;
    (proxy, exchange_at(&uri, &queue.name))
}

#[tokio::test]
async fn each_subscriber_receives_all_events_in_order() {
    let queue = Queue::new();
    let exchange = exchange(&queue);
    let emitter = emitter(&exchange).await;
    let mut subscribers = [subscriber(&exchange).await, subscriber(&exchange).await];
    emitter.publish(Kind::Online, objects(1..=3).into_iter());
    emitter.publish(Kind::Seen, objects([3]).into_iter());
    emitter.publish_given_up(given_up(7));
    emitter.publish_groups(group_changes(2));
    emitter.publish(Kind::Gone, objects([i64::MIN, i64::MAX]).into_iter());
    for subscriber in &mut subscribers {
        expect_event(subscriber, Kind::Online, 1..=3).await;
        expect_event(subscriber, Kind::Seen, [3]).await;
        assert_eq!(next(subscriber).await, Notification::GivenUp(vec![given_up(7)]));
        expect_event(subscriber, Kind::Gone, [i64::MIN, i64::MAX]).await;
    }
}

/// A queue that is bound to one routing key of the events of another queue.
struct BoundQueue {
    _connection: Connection,
    channel: Channel,
    name: String,
    key: &'static str,
}

impl BoundQueue {
    async fn new(queue: &Queue, key: &'static str) -> Self {
        let (connection, channel) = channel(&amqp_uri()).await;
        let name = format!("{}.other", queue.name);
        let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
        let none = FieldTable::default;
        channel.queue_declare(name.as_str().into(), exclusive, none()).await.unwrap();
        let (own, topics) = (name.as_str().into(), format!("{}{EVENTS}", queue.name).into());
        let bind = QueueBindOptions::default();
        channel.queue_bind(own, topics, key.into(), bind, none()).await.unwrap();
        Self { _connection: connection, channel, name, key }
    }

    /// The body of the next message, which must have the documented form and this number.
    async fn next(&self, sequence: u64) -> serde_json::Value {
        let message = eventually("a message arrives", PATIENCE, async || {
            let options = BasicGetOptions { no_ack: true };
            self.channel.basic_get(self.name.as_str().into(), options).await.unwrap()
        })
        .await;
        assert_eq!(message.routing_key.as_str(), self.key);
        let content_type = message.properties.content_type().as_ref().unwrap();
        assert_eq!(content_type.as_str(), "application/json");
        let body: serde_json::Value = serde_json::from_slice(&message.data).unwrap();
        assert_eq!((&body["version"], &body["sequence"]), (&2.into(), &sequence.into()));
        body
    }
}

#[tokio::test]
async fn group_changes_are_numbered_and_of_bounded_size() {
    let queue = Queue::new();
    let emitter = emitter(&exchange(&queue)).await;
    let bound = BoundQueue::new(&queue, "group").await;
    emitter.publish_given_up(given_up(9));
    emitter.publish_groups(Vec::new());
    let changes = group_changes(1_001);
    emitter.publish_groups(changes.clone());
    let (mut received, mut sequence) = (Vec::new(), 1);
    while received.len() < changes.len() {
        sequence += 1;
        let mut body = bound.next(sequence).await;
        assert_eq!(body["objects"], serde_json::json!([]));
        let groups: Vec<GroupChange> = serde_json::from_value(body["groups"].take()).unwrap();
        assert!((1..=1_000).contains(&groups.len()));
        received.extend(groups);
    }
    assert_eq!(received, changes);
}

#[tokio::test]
async fn bound_queue_gets_documented_messages_of_bounded_size() {
    let queue = Queue::new();
    let emitter = emitter(&exchange(&queue)).await;
    let bound = BoundQueue::new(&queue, "online").await;
    emitter.publish(Kind::Gone, objects([9]).into_iter());
    emitter.publish(Kind::Online, objects(1..=2_001).into_iter());
    let mut ids = Vec::new();
    for sequence in 2..=4 {
        let body = bound.next(sequence).await;
        let objects = body["objects"].as_array().unwrap();
        assert!(objects.len() <= 1_000);
        assert_eq!(objects[0]["last_seen"], "2023-11-14T22:13:20.123456Z");
        ids.extend(
            objects.iter().map(|object| object["id"].as_str().unwrap().parse::<i64>().unwrap()),
        );
    }
    assert_eq!(ids, (1..=2_001).collect::<Vec<_>>());
}

#[tokio::test]
async fn events_dropped_during_an_outage_are_missed_after_it() {
    let queue = Queue::new();
    let mut subscriber = subscriber(&exchange(&queue)).await;
    let (proxy, exchange) = proxied(&queue).await;
    let emitter = emitter(&exchange).await;
    emitter.publish(Kind::Online, objects([1]).into_iter());
    expect_event(&mut subscriber, Kind::Online, [1]).await;

    proxy.cut();
    let mut status = emitter.status().unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_err)).await.unwrap().unwrap();
    // Far more events than the emitter buffers. No call waits.
    for id in 0..100_000 {
        emitter.publish(Kind::Seen, objects([id]).into_iter());
    }
    // Only the sequence numbers show the loss: no further event is published.
    proxy.restore();
    let reason = expect_missed(&mut subscriber).await;
    assert!(reason.contains("are missing"), "{reason}");

    emitter.publish(Kind::Gone, objects([2]).into_iter());
    expect_event(&mut subscriber, Kind::Gone, [2]).await;
}

#[tokio::test]
async fn publish_and_close_do_not_wait_for_an_absent_broker() {
    let uri = format!("amqp://127.0.0.1:{}", free_port());
    let emitter = Emitter::start(&exchange_at(&uri, "objects"), "test", &Supervisor::default());
    for id in 0..100_000 {
        emitter.publish(Kind::Seen, objects([id]).into_iter());
        emitter.publish_given_up(given_up(id));
    }
    emitter.publish_groups(group_changes(500_000));
    assert!(emitter.status().unwrap().borrow().is_err());
    timeout(PATIENCE, emitter.close()).await.unwrap();
}

#[tokio::test]
async fn emitter_and_subscriber_survive_a_broker_restart() {
    let mut node = RabbitNode::start().await;
    let exchange = exchange_at(&node.amqp_uri(), "objects");
    let emitter = emitter(&exchange).await;
    let mut subscriber = subscriber(&exchange).await;
    node.restart().await;
    expect_missed(&mut subscriber).await;
    let mut status = emitter.status().unwrap();
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    emitter.publish(Kind::Online, objects([1]).into_iter());
    // Depending on its number, the event may or may not be preceded by Missed.
    match next(&mut subscriber).await {
        Notification::Missed(_) => expect_event(&mut subscriber, Kind::Online, [1]).await,
        event => assert_eq!(event, Notification::Committed(Kind::Online, objects([1]))),
    }
}

#[tokio::test]
async fn services_user_can_publish_and_receive_events() {
    let node = RabbitNode::start().await;
    make_user(&node, "secret", "team.objects").await;
    let uri = node.amqp_uri().replace("guest:guest@", "services:secret@");
    let exchange = exchange_at(&uri, "team.objects");
    let emitter = emitter(&exchange).await;
    let mut subscriber = subscriber(&exchange).await;
    emitter.publish(Kind::Online, objects([1]).into_iter());
    expect_event(&mut subscriber, Kind::Online, [1]).await;
    // The dot in the name is not a wildcard in the permissions.
    let others = Emitter::start(&exchange_at(&uri, "teamXobjects"), "test", &Supervisor::default());
    eventually("another exchange is refused", PATIENCE, async || {
        let status = others.status().unwrap().borrow().clone();
        status.err().filter(|reason| reason.contains("ACCESS_REFUSED"))
    })
    .await;
}

#[tokio::test]
async fn deleted_exchange_is_declared_and_bound_again() {
    let queue = Queue::new();
    let exchange = exchange(&queue);
    let emitter = emitter(&exchange).await;
    let mut subscriber = subscriber(&exchange).await;
    let (_connection, channel) = channel(&amqp_uri()).await;
    let name = format!("{}{EVENTS}", queue.name);
    channel.exchange_delete(name.into(), ExchangeDeleteOptions::default()).await.unwrap();
    let publishing = tokio::spawn(async move {
        loop {
            emitter.publish(Kind::Seen, objects([1]).into_iter());
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    });
    expect_missed(&mut subscriber).await;
    expect_event(&mut subscriber, Kind::Seen, [1]).await;
    publishing.abort();
}

#[tokio::test]
async fn undecodable_event_is_missed_unknown_kind_is_ignored() {
    let queue = Queue::new();
    let mut subscriber = subscriber(&exchange(&queue)).await;
    let (_connection, channel) = channel(&amqp_uri()).await;
    let publish = async |key: &str, body: String| {
        let exchange = format!("{}{EVENTS}", queue.name).into();
        let (options, properties) = (BasicPublishOptions::default(), BasicProperties::default());
        let bytes = body.as_bytes();
        channel.basic_publish(exchange, key.into(), options, bytes, properties).await.unwrap();
    };
    let body = |sequence: u64, object: &str| {
        let source = "019ab3c5-5d7e-7c41-9a35-0f2d1f6c2b11";
        let object = object.replace("TIME", "2023-11-14T22:13:20.123456Z");
        format!(r#"{{"version":1,"source":"{source}","sequence":{sequence},"objects":[{object}]}}"#)
    };
    publish("seen", "nonsense".to_owned()).await;
    publish("seen", r#"{"version":3}"#.to_owned()).await;
    for _ in 0..2 {
        let reason = expect_missed(&mut subscriber).await;
        assert!(reason.contains("cannot decode"), "{reason}");
    }
    let object = r#"{"id":1,"last_seen":"TIME"}"#;
    publish("online", body(1, object)).await;
    publish("renamed", body(2, object)).await;
    publish("new", body(3, r#"{"name":"1","at":"TIME"}"#)).await;
    publish("seen", body(4, object)).await;
    expect_event(&mut subscriber, Kind::Online, [1]).await;
    expect_event(&mut subscriber, Kind::Seen, [1]).await;
}

// Field case 4.5
#[tokio::test]
async fn single_gap_is_noticed_although_no_event_follows() {
    let queue = Queue::new();
    let exchange = exchange(&queue);
    let emitter = emitter(&exchange).await;
    let mut subscriber = subscriber(&exchange).await;
    emitter.publish(Kind::Online, objects([1]).into_iter());
    expect_event(&mut subscriber, Kind::Online, [1]).await;
    emitter.leave_gap("for a test");
    let reason = expect_missed(&mut subscriber).await;
    assert!(reason.contains("are missing"), "{reason}");
    emitter.publish(Kind::Online, objects([2]).into_iter());
    expect_event(&mut subscriber, Kind::Online, [2]).await;
}
