//! Tests on a RabbitMQ cluster of three nodes.

use std::time::Duration;

use messaging::queue::QueueType;
use testkit::{Proxy, Queue, RabbitNode, eventually, wait_for};
use tokio::time::timeout;

use crate::queue::test_queue::{PATIENCE, amqp_config, config_at, connected, consumer};

// Field case 3.1: while the node is down, RabbitMQ 3.10 refuses the messages of channels that have
// published to its leader.
#[tokio::test]
async fn publisher_survives_the_death_of_the_leaders_node() {
    let mut nodes = RabbitNode::start_cluster().await;
    let config = |node: &RabbitNode| config_at(&node.amqp_uri(), "objects", QueueType::Quorum);
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

/// The node that is cut off keeps its connections and reports an empty queue.
#[tokio::test]
async fn idle_consumer_leaves_a_node_that_is_cut_off() {
    let nodes = RabbitNode::start_cluster().await;
    let [cut_off, others] = [&nodes[..1], &nodes[1..]];
    let config = |nodes: &[RabbitNode]| {
        let addresses: Vec<String> =
            nodes.iter().map(|node| format!("127.0.0.1:{}", node.amqp_port())).collect();
        let uri = format!("amqp://guest:guest@{}/%2f", addresses.join(","));
        config_at(&uri, "objects", QueueType::Quorum)
    };
    for node in others {
        node.set_accepting(false).await;
    }
    let mut consumer = consumer(&connected(&config(&nodes)).await, 10);
    let mut status = consumer.status();
    let received = tokio::spawn(async move { consumer.next().await.id().ok() });
    status.wait_for(Result::is_ok).await.unwrap();
    for node in others {
        node.set_accepting(true).await;
    }
    cut_off[0].disconnect_from(others).await;
    let publisher = connected(&config(others)).await;
    let publish = async || publisher.publish_ids("c", &[1], PATIENCE).await.ok();
    eventually("the other nodes have a leader", PATIENCE, publish).await;
    assert_eq!(timeout(PATIENCE, received).await.unwrap().unwrap(), Some(1));
}

#[tokio::test]
async fn lost_session_is_followed_by_one_on_another_node() {
    let queue = Queue::new();
    let uri = testkit::amqp_uri();
    let target = uri.rsplit('@').next().unwrap().split('/').next().unwrap().to_owned();
    let proxies = [Proxy::start(target.clone()).await, Proxy::start(target).await];
    let mut config = amqp_config(&queue, QueueType::Quorum);
    let addresses = proxies.each_ref().map(|proxy| proxy.addr().to_string()).join(",");
    config.amqp_uri = format!("amqp://guest:guest@{addresses}/%2f").parse().unwrap();
    let _publisher = connected(&config).await;
    let accepted = || proxies.each_ref().map(Proxy::accepted);
    let mut used = usize::from(accepted()[0] == 0);
    // In random order, half of the sessions would return to their node.
    for _ in 0..6 {
        let before = accepted();
        proxies[used].cut();
        proxies[used].restore();
        wait_for("there is another connection", async || (accepted() != before).then_some(()))
            .await;
        used = 1 - used;
        let mut expected = before;
        expected[used] += 1;
        assert_eq!(accepted(), expected);
        // A connection that is cut during the login would be tried on the other node.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}
