//! A RabbitMQ that delivers nothing to a waiting consumer although the queue is not empty.

use broker::{Config, Consumer, Delivery, Disposition, LinkStatus, QueueConfig, QueueType};
use lapin::options::QueuePurgeOptions;
use lapin::{Connection, ConnectionProperties};
use testbed::RabbitNode;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::test_queue::{PATIENCE, connected, consumer};

const QUEUE: &str = "objects";

/// Makes the queue forget its consumers, without informing their channels or clients.
async fn forget_consumers(node: &RabbitNode) {
    // RabbitMQ 4 has another form of the call.
    let forget = format!(
        "Cancel = fun(Channel, Tag) -> case rabbit_misc:version() of \
                 \"3.\" ++ _ -> {{basic_cancel, Channel, Tag, undefined, <<\"test\">>}}; \
                 _ -> {{stop_consumer, #{{pid => Channel, consumer_tag => Tag, user => <<\"test\">>}}}} \
             end end, \
         {{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{QUEUE}\">>)), \
         [ok] = [gen_server2:call(amqqueue:get_pid(Q), Cancel(element(1, C), element(2, C))) \
                 || C <- rabbit_amqqueue:consumers(Q)]."
    );
    node.rabbitmqctl(&["eval", &forget]).await;
}

/// Consumes in the background.
fn consume(mut consumer: Consumer) -> mpsc::UnboundedReceiver<Delivery> {
    let (delivered, deliveries) = mpsc::unbounded_channel();
    tokio::spawn(async move { while delivered.send(consumer.next().await).is_ok() {} });
    deliveries
}

/// Acks the next delivery, and returns its id.
async fn ack_one(deliveries: &mut mpsc::UnboundedReceiver<Delivery>) -> i64 {
    let delivery = timeout(PATIENCE, deliveries.recv()).await.unwrap().unwrap();
    let id = delivery.id().unwrap();
    delivery.settle(Disposition::Ack).await;
    id
}

/// Waits until the consumer's status reports the starvation.
async fn wait_until_starving(status: &mut watch::Receiver<LinkStatus>) {
    let status = timeout(PATIENCE * 2, status.wait_for(Result::is_err)).await.unwrap();
    let reason = status.unwrap().clone().unwrap_err();
    assert!(reason.contains("nothing although the queue is not empty"), "{reason}");
}

async fn wait_until_healthy(status: &mut watch::Receiver<LinkStatus>) {
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
}

#[tokio::test]
async fn starving_consumer_reports_it_and_starts_a_new_session() {
    let node = RabbitNode::start().await;
    let (queue_name, queue_type) = (QUEUE.to_owned(), QueueType::Classic);
    let queue = QueueConfig { queue_name, queue_type, amqp_ca: None };
    let config = Config { amqp_uri: node.amqp_uri().parse().unwrap(), queue };
    let publisher = connected(&config).await;
    let publish = async |id| publisher.publish_ids("c", &[id], PATIENCE).await.unwrap();
    let consumer = consumer(&publisher, 10);
    let mut status = consumer.status();
    let mut deliveries = consume(consumer);
    publish(1).await;
    assert_eq!(ack_one(&mut deliveries).await, 1);
    wait_until_healthy(&mut status).await;

    forget_consumers(&node).await;
    publish(2).await;
    wait_until_starving(&mut status).await;
    assert_eq!(ack_one(&mut deliveries).await, 2);
    wait_until_healthy(&mut status).await;

    // Another client removes the message before the new session receives it.
    let uri = node.amqp_uri().parse().unwrap();
    let other = Connection::connect_uri(uri, ConnectionProperties::default()).await.unwrap();
    let other = other.create_channel().await.unwrap();
    forget_consumers(&node).await;
    publish(3).await;
    wait_until_starving(&mut status).await;
    other.queue_purge(QUEUE.into(), QueuePurgeOptions::default()).await.unwrap();
    wait_until_healthy(&mut status).await;
    publish(4).await;
    while ack_one(&mut deliveries).await != 4 {}
}
