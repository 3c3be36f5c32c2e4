//! Permissions of the user that scripts/rabbitmq-user creates.

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::FieldTable;
use lapin::{BasicProperties, Connection};
use messaging::queue::{Config, DeadLetterAction, QueueType};
use testkit::RabbitNode;

use crate::make_user;
use crate::queue::test_queue::{
    PATIENCE, SECOND, ack_next, config_at, connected, consumer, dead, next, process_all, retry,
};

const PASSWORD: &str = "p/w \"of\" services";

async fn declare(connection: &Connection, queue: &str) -> Result<(), String> {
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    // Each attempt needs a new channel, because the broker closes the channel with its refusal.
    let channel = connection.create_channel().await.unwrap();
    let declared = channel.queue_declare(queue.into(), durable, FieldTable::default()).await;
    declared.map(drop).map_err(|error| error.to_string())
}

#[tokio::test]
async fn services_user_can_use_only_its_own_queues() {
    let node = RabbitNode::start().await;
    // The dot in the name is not a wildcard in the permissions.
    let name = "team.objects";
    make_user(&node, PASSWORD, name).await;
    let uri = node.amqp_uri().replace("guest:guest@", "services:p%2Fw%20%22of%22%20services@");
    run_every_operation(&config_at(&uri, name, QueueType::Quorum)).await;
    // The script runs at each start of the broker.
    make_user(&node, PASSWORD, name).await;
    // The publisher detects that the queue has the other type.
    connected(&config_at(&uri, name, QueueType::Classic)).await;

    let (connection, publishing) = crate::channel(&uri).await;
    let allowed = declare(&connection, "team.objects.retry.2s").await.unwrap_err();
    assert!(allowed.contains("PRECONDITION_FAILED"), "{allowed}");
    for other in ["other", "teamXobjects", "team.objects2", "team.objects.dead2", "my.team.objects"]
    {
        let refused = declare(&connection, other).await.unwrap_err();
        assert!(refused.contains("ACCESS_REFUSED"), "{other}: {refused}");
    }
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

/// An older version of the script did not know shards. RabbitMQ 4 also checks the permissions for
/// questions about a queue.
#[tokio::test]
async fn user_without_permissions_for_shards_can_consume() {
    let node = RabbitNode::start().await;
    let queues = r"^objects(\.dead|\.retry\.[0-9]+s)?$";
    node.rabbitmqctl(&["add_user", "old", "secret"]).await;
    node.rabbitmqctl(&["set_permissions", "old", queues, r"^amq\.default$", queues]).await;
    let uri = node.amqp_uri().replace("guest:guest@", "old:secret@");
    run_every_operation(&config_at(&uri, "objects", QueueType::Quorum)).await;
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
    assert_eq!(process_all(config, DeadLetterAction::List).await.len(), 1);
    assert_eq!(process_all(config, DeadLetterAction::Redrive).await.len(), 1);
    assert_eq!(ack_next(&mut consumer, 1).await, [2], "the redriven letter is delivered");
    publisher.publish_ids("c", &[3], PATIENCE).await.unwrap();
    next(&mut consumer).await.settle(dead("answered 500")).await;
    assert_eq!(process_all(config, DeadLetterAction::Purge).await.len(), 1);
}
