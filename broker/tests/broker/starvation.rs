//! A RabbitMQ that has messages, and gives none to a consumer that waits for one.

use broker::{Config, Consumer, Delivery, Disposition, LinkStatus, QueueConfig, QueueType};
use lapin::options::QueuePurgeOptions;
use lapin::{Connection, ConnectionProperties};
use testbed::RabbitNode;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::test_queue::{PATIENCE, connected, consumer};

const QUEUE: &str = "objects";

/// Has the queue forget its consumers, of which it tells neither their channels nor their clients.
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

/// Acks the next delivery, and says of which object it is.
async fn acked(deliveries: &mut mpsc::UnboundedReceiver<Delivery>) -> i64 {
    let delivery = timeout(PATIENCE, deliveries.recv()).await.unwrap().unwrap();
    let id = delivery.id().unwrap();
    delivery.settle(Disposition::Ack).await;
    id
}

/// Waits until the consumer says that it is given nothing.
async fn says_so(status: &mut watch::Receiver<LinkStatus>) {
    let not = timeout(PATIENCE * 2, status.wait_for(Result::is_err)).await.unwrap();
    let reason = not.unwrap().clone().unwrap_err();
    assert!(reason.contains("nothing although the queue is not empty"), "{reason}");
}

async fn is_well(status: &mut watch::Receiver<LinkStatus>) {
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_consumer_that_gets_nothing_although_the_queue_is_not_empty_says_so_and_consumes_anew() {
    let node = RabbitNode::start().await;
    let (queue_name, queue_type) = (QUEUE.to_owned(), QueueType::Classic);
    let queue = QueueConfig { queue_name, queue_type, amqp_ca: None };
    let config = Config { amqp_uri: node.amqp_uri().parse().unwrap(), queue };
    let publisher = connected(&config).await;
    let publish = async |id| publisher.publish_ids("c", &[id], PATIENCE).await.unwrap();
    let ours = consumer(&publisher, 10);
    let mut status = ours.status();
    let mut deliveries = consume(ours);
    publish(1).await;
    assert_eq!(acked(&mut deliveries).await, 1);
    is_well(&mut status).await;

    forget_consumers(&node).await;
    publish(2).await;
    says_so(&mut status).await;
    assert_eq!(acked(&mut deliveries).await, 2);
    is_well(&mut status).await;

    // Somebody else takes it, before it can be given to the new session.
    let uri = node.amqp_uri().parse().unwrap();
    let other = Connection::connect_uri(uri, ConnectionProperties::default()).await.unwrap();
    let other = other.create_channel().await.unwrap();
    forget_consumers(&node).await;
    publish(3).await;
    says_so(&mut status).await;
    other.queue_purge(QUEUE.into(), QueuePurgeOptions::default()).await.unwrap();
    is_well(&mut status).await;
    publish(4).await;
    while acked(&mut deliveries).await != 4 {}
}
