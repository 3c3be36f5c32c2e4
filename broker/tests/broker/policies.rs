//! Effects of an operator's settings of RabbitMQ on the queues: policies and the default queue
//! type.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use broker::{Config, Disposition, Publisher, QueueConfig, QueueType};
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ConnectionProperties};
use testbed::{RabbitNode, eventually};
use tokio::time::timeout;
use tracing::Level;
use tracing::field::{Field, Visit};

use crate::test_queue::{PATIENCE, connected, consumer, next};

const QUEUE: &str = "objects";

fn config(uri: &str, queue_type: QueueType) -> Config {
    let queue = QueueConfig { queue_name: QUEUE.to_owned(), queue_type, amqp_ca: None };
    Config { amqp_uri: uri.parse().unwrap(), queue }
}

async fn raw_channel(uri: &str) -> (Connection, Channel) {
    let properties = ConnectionProperties::default();
    let connection = Connection::connect_uri(uri.parse().unwrap(), properties).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

// Field case 9.4
#[tokio::test]
async fn classic_queue_ignores_the_default_queue_type() {
    let node = RabbitNode::start().await;
    node.rabbitmqctl(&["add_vhost", "quorums", "--default-queue-type", "quorum"]).await;
    node.rabbitmqctl(&["set_permissions", "-p", "quorums", "guest", ".*", ".*", ".*"]).await;
    let uri = node.amqp_uri().replace("%2f", "quorums");
    let is_classic = async || {
        let listed = ["list_queues", "-p", "quorums", "--no-table-headers", "name", "type"];
        let listed = node.rabbitmqctl(&listed).await;
        listed.lines().any(|line| line.split_whitespace().eq([QUEUE, "classic"]))
    };
    let publisher = connected(&config(&uri, QueueType::Classic)).await;
    assert!(is_classic().await);
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    publisher.close().await;
    let (_connection, channel) = raw_channel(&uri).await;
    channel.queue_delete(QUEUE.into(), QueueDeleteOptions::default()).await.unwrap();

    // With this default type, the Go services' declaration creates a quorum queue without a
    // dead-letter exchange.
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(QUEUE.into(), durable, FieldTable::default()).await.unwrap();
    assert!(!is_classic().await);
    for queue_type in [QueueType::Classic, QueueType::Quorum] {
        let publisher = Publisher::start(&config(&uri, queue_type), "test").unwrap();
        let mut status = publisher.status();
        let refused =
            status.wait_for(|status| status.as_ref().is_err_and(|it| it.contains("arguments")));
        timeout(PATIENCE, refused).await.expect("the queue should be refused").unwrap();
    }
}

/// Collects the errors that a thread logs while this is its default subscriber.
#[derive(Clone, Default)]
struct Errors(Arc<Mutex<Vec<String>>>);

impl Errors {
    async fn wait_for(&self, text: &str) {
        let errors = || self.0.lock().unwrap().clone();
        let description = format!("{text:?} is logged");
        eventually(&description, PATIENCE, async || {
            errors().iter().any(|error| error.contains(text)).then_some(())
        })
        .await;
    }
}

impl tracing::Subscriber for Errors {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR && metadata.target().starts_with("broker")
    }

    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl Visit for Text {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                write!(self.0, "{field}={value:?} ").unwrap();
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

// Field case 9.3
#[tokio::test]
async fn messages_destroyed_by_policies_are_logged_as_errors() {
    let errors = Errors::default();
    let _guard = tracing::subscriber::set_default(errors.clone());
    let node = RabbitNode::start().await;
    let publisher = connected(&config(&node.amqp_uri(), QueueType::Quorum)).await;
    let mut consumer = consumer(&publisher, 1);
    // The consumer holds the first message, so that the second stays in the queue.
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    let held = next(&mut consumer).await;
    let ttl =
        ["set_policy", "short", "^objects$", r#"{"message-ttl":100}"#, "--apply-to", "queues"];
    node.rabbitmqctl(&ttl).await;
    publisher.publish_ids("c", &[2], PATIENCE).await.unwrap();
    errors.wait_for("messages expired in the queue before any lookup").await;
    node.rabbitmqctl(&["clear_policy", "short"]).await;
    held.settle(Disposition::Ack).await;

    // An `expires` policy would delete a queue without consumers in the same way.
    let (_connection, channel) = raw_channel(&node.amqp_uri()).await;
    let delete = async |queue: &str| {
        channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    };
    delete("objects.dead").await;
    errors.wait_for("queue=objects.dead ").await;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    eventually("the queue is declared again", PATIENCE, async || {
        let (_connection, channel) = raw_channel(&node.amqp_uri()).await;
        channel.queue_declare("objects.dead".into(), passive, FieldTable::default()).await.ok()
    })
    .await;
    delete(QUEUE).await;
    let next = tokio::spawn(async move { consumer.next().await });
    errors.wait_for("queue=objects ").await;
    next.abort();
}

// Field case 9.3
#[tokio::test]
async fn script_warns_of_policies_that_destroy_messages() {
    let node = RabbitNode::start().await;
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/rabbitmq-user");
    let environment =
        [("RABBITMQ_SERVICES_USER", "services"), ("RABBITMQ_SERVICES_PASSWORD", "secret")];
    let set = r#"[rabbit_policy:set(<<"/">>, Name, Pattern, [{Key, 100}], 0, <<"queues">>, <<"test">>)
        || {Name, Pattern, Key} <- [
            {<<"others">>, <<"^other">>, <<"message-ttl">>},
            {<<"harmless">>, <<".*">>, <<"delivery-limit">>},
            {<<"short">>, <<"retry">>, <<"message-ttl">>},
            {<<"all">>, <<"">>, <<"expires">>}]]."#;
    node.rabbitmqctl(&["eval", set]).await;
    let printed = node.run_script(Path::new(script), &environment).await;
    for expected in ["policy \"short\"", "objects.retry.2s", "policy \"all\"", "objects.dead"] {
        assert!(printed.contains(expected), "{expected}: {printed}");
    }
    assert!(!printed.contains("others") && !printed.contains("harmless"), "{printed}");
}
