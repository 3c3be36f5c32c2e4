//! Permissions of the user that scripts/rabbitmq-user creates.

use std::path::Path;

use broker::{Config, DeadLetterAction, QueueConfig, QueueType, Selection};
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties};
use testbed::RabbitNode;

use crate::test_queue::{
    PATIENCE, SECOND, ack_next, connected, consumer, dead, next, process_dead_letters, retry,
};

const PASSWORD: &str = "p/w \"of\" services";

async fn make_user(node: &RabbitNode, queue: &str) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/rabbitmq-user");
    let environment = [
        ("RABBITMQ_SERVICES_USER", "services"),
        ("RABBITMQ_SERVICES_PASSWORD", PASSWORD),
        ("QUEUE_NAME", queue),
    ];
    node.run_script(Path::new(script), &environment).await;
    let uri = node.amqp_uri();
    uri.replace("guest:guest@", "services:p%2Fw%20%22of%22%20services@")
}

/// Each attempt needs a new channel, because the broker closes the channel with its refusal.
async fn channel(connection: &Connection) -> Channel {
    connection.create_channel().await.unwrap()
}

async fn declare(connection: &Connection, queue: &str) -> Result<(), String> {
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let declared = channel(connection).await;
    let declared = declared.queue_declare(queue.into(), durable, FieldTable::default()).await;
    declared.map(drop).map_err(|error| error.to_string())
}

#[tokio::test]
async fn services_user_can_use_only_its_own_queues() {
    let node = RabbitNode::start().await;
    // The dot in the name is not a wildcard in the permissions.
    let name = "team.objects";
    let uri = make_user(&node, name).await;
    let config = |queue_type| {
        let queue = QueueConfig { queue_name: name.to_owned(), queue_type, amqp_ca: None };
        Config { amqp_uri: uri.parse().unwrap(), queue }
    };
    run_every_operation(&config(QueueType::Quorum)).await;
    // The script runs at each start of the broker.
    make_user(&node, name).await;
    // The publisher detects that the queue has the other type.
    connected(&config(QueueType::Classic)).await;

    let connection = Connection::connect_uri(uri.parse().unwrap(), ConnectionProperties::default());
    let connection = connection.await.unwrap();
    let allowed = declare(&connection, "team.objects.retry.2s").await.unwrap_err();
    assert!(allowed.contains("PRECONDITION_FAILED"), "{allowed}");
    for other in ["other", "teamXobjects", "team.objects2", "team.objects.dead2", "my.team.objects"]
    {
        let refused = declare(&connection, other).await.unwrap_err();
        assert!(refused.contains("ACCESS_REFUSED"), "{other}: {refused}");
    }
    let publishing = channel(&connection).await;
    publishing.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let published = publishing
        .basic_publish(
            "amq.fanout".into(),
            "".into(),
            BasicPublishOptions::default(),
            b"{}",
            BasicProperties::default(),
        )
        .await;
    let refused = match published {
        Ok(confirm) => confirm.await.unwrap_err(),
        Err(error) => error,
    };
    assert!(refused.to_string().contains("ACCESS_REFUSED"), "{refused}");
    let tags = node.rabbitmqctl(&["list_users", "--no-table-headers"]).await;
    let services = tags.lines().find(|line| line.starts_with("services")).unwrap();
    assert!(
        services.ends_with("[]"),
        "the user must not have a tag for the management page: {services}"
    );
}

/// Publishes and consumes, retries and dead-letters messages; lists, redrives and purges dead
/// letters.
async fn run_every_operation(config: &Config) {
    let publisher = connected(config).await;
    publisher.publish_ids("c", &[1, 2], SECOND * 5).await.unwrap();
    let mut consumer = consumer(&publisher, 1);
    next(&mut consumer).await.settle(retry("no answer")).await;
    next(&mut consumer).await.settle(dead("answered 500")).await;
    assert_eq!(ack_next(&mut consumer, 1).await, [1], "the retry is delivered again");
    let all = Selection::default();
    assert_eq!(process_dead_letters(config, &all, DeadLetterAction::List).await.len(), 1);
    assert_eq!(process_dead_letters(config, &all, DeadLetterAction::Redrive).await.len(), 1);
    assert_eq!(ack_next(&mut consumer, 1).await, [2], "the redriven letter is delivered");
    publisher.publish_ids("c", &[3], PATIENCE).await.unwrap();
    next(&mut consumer).await.settle(dead("answered 500")).await;
    assert_eq!(process_dead_letters(config, &all, DeadLetterAction::Purge).await.len(), 1);
}
