//! Tests on a RabbitMQ cluster of three nodes.

use broker::{Config, QueueConfig, QueueType};
use testbed::{RabbitNode, eventually};

use crate::test_queue::{PATIENCE, connected};

fn config(node: &RabbitNode) -> Config {
    let (queue_name, queue_type) = ("objects".to_owned(), QueueType::Quorum);
    let queue = QueueConfig { queue_name, queue_type, amqp_ca: None };
    Config { amqp_uri: node.amqp_uri().parse().unwrap(), queue }
}

// Field case 3.1: while the node is down, RabbitMQ 3.10 refuses the messages of channels that have
// published to
// its leader.
#[tokio::test]
async fn publisher_survives_the_death_of_the_leaders_node() {
    let mut nodes = RabbitNode::start_cluster().await;
    // The leader of a queue is on the node that the queue was declared on.
    connected(&config(&nodes[0])).await.close().await;
    let publisher = connected(&config(&nodes[1])).await;
    assert!(nodes[0].leads("objects").await);
    nodes[0].kill().await;
    eventually("messages are confirmed again", PATIENCE * 3, async || {
        publisher.publish_ids("c", &[1], PATIENCE).await.ok()
    })
    .await;
}
