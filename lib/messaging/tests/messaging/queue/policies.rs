//! Effects of an operator's settings of RabbitMQ on the queues: policies and the default queue
//! type.

use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use messaging::queue::{Disposition, QueueType};
use testkit::{LogCapture, RabbitNode, eventually};
use tracing::Level;

use crate::queue::test_queue::{PATIENCE, config_at, connected, consumer, next, refused};
use crate::{channel, make_user};

const QUEUE: &str = "objects";

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
    let publisher = connected(&config_at(&uri, QUEUE, QueueType::Classic)).await;
    assert!(is_classic().await);
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    publisher.close().await;
    let (_connection, channel) = channel(&uri).await;
    channel.queue_delete(QUEUE.into(), QueueDeleteOptions::default()).await.unwrap();

    // With this default type, the Go services' declaration creates a quorum queue without a
    // dead-letter exchange.
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(QUEUE.into(), durable, FieldTable::default()).await.unwrap();
    assert!(!is_classic().await);
    for queue_type in [QueueType::Classic, QueueType::Quorum] {
        refused(&config_at(&uri, QUEUE, queue_type), "arguments").await;
    }
}

// Field case 9.3
#[tokio::test]
async fn messages_destroyed_by_policies_are_logged_as_errors() {
    let errors = LogCapture::start(Level::ERROR, "messaging::queue");
    let node = RabbitNode::start().await;
    let uri = node.amqp_uri();
    let publisher = connected(&config_at(&uri, QUEUE, QueueType::Quorum)).await;
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
    node.delete_queue("objects.dead").await;
    errors.wait_for("queue=objects.dead ").await;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    eventually("the queue is declared again", PATIENCE, async || {
        let (_connection, channel) = channel(&uri).await;
        channel.queue_declare("objects.dead".into(), passive, FieldTable::default()).await.ok()
    })
    .await;
    node.delete_queue(QUEUE).await;
    let next = tokio::spawn(async move { consumer.next().await });
    errors.wait_for("queue=objects ").await;
    next.abort();
}

/// The consumer's own number of shards is smaller.
#[tokio::test]
async fn messages_that_expired_in_any_shard_are_logged_as_errors() {
    let errors = LogCapture::start(Level::ERROR, "messaging::queue");
    let node = RabbitNode::start().await;
    let ttl =
        ["set_policy", "short", r"^objects\.1$", r#"{"message-ttl":1}"#, "--apply-to", "queues"];
    node.rabbitmqctl(&ttl).await;
    let mut config = config_at(&node.amqp_uri(), QUEUE, QueueType::Quorum);
    config.queue.shards = 2;
    let publisher = connected(&config).await;
    let ids: Vec<i64> = (0..20).collect();
    publisher.publish_ids("c", &ids, PATIENCE).await.unwrap();
    config.queue.shards = 1;
    let mut consumer = consumer(&connected(&config).await, 100);
    let consuming = tokio::spawn(async move {
        loop {
            drop(consumer.next().await);
        }
    });
    errors.wait_for("queue=\"objects.1\"").await;
    consuming.abort();
}

// Field case 9.3
#[tokio::test]
async fn script_warns_of_policies_that_destroy_messages() {
    let node = RabbitNode::start().await;
    let set = r#"[rabbit_policy:set(<<"/">>, Name, Pattern, [{Key, 100}], 0, <<"queues">>, <<"test">>)
        || {Name, Pattern, Key} <- [
            {<<"others">>, <<"^other">>, <<"message-ttl">>},
            {<<"harmless">>, <<".*">>, <<"delivery-limit">>},
            {<<"short">>, <<"retry">>, <<"message-ttl">>},
            {<<"shards">>, <<"^objects[.](9|31)$">>, <<"max-length">>},
            {<<"no shard">>, <<"^objects[.]32$">>, <<"max-length">>},
            {<<"all">>, <<"">>, <<"expires">>}]]."#;
    node.rabbitmqctl(&["eval", set]).await;
    let printed = make_user(&node, "secret", QUEUE).await;
    for expected in [
        "policy \"short\" sets message-ttl and matches objects.retry.2s ",
        "policy \"shards\" sets max-length and matches objects.9 (a shard)",
        "policy \"all\" sets expires and matches objects objects.dead ",
    ] {
        assert!(printed.contains(expected), "{expected}: {printed}");
    }
    for unexpected in ["others", "harmless", "no shard"] {
        assert!(!printed.contains(unexpected), "{printed}");
    }
}
