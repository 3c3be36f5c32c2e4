//! A RabbitMQ that has messages, and gives none to a consumer that waits for one.

use broker::{Config, Disposition, QueueConfig, QueueType};
use testbed::RabbitNode;
use tokio::time::timeout;

use crate::place::{PATIENCE, connected, consumer, next};

const QUEUE: &str = "objects";

/// Has the queue forget its consumers, of which it tells neither their channels nor their clients.
async fn forget_consumers(node: &RabbitNode) {
    let forget = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{QUEUE}\">>)), \
         [ok] = [gen_server2:call(amqqueue:get_pid(Q), \
                 {{basic_cancel, element(1, C), element(2, C), undefined, <<\"test\">>}}) \
                 || C <- rabbit_amqqueue:consumers(Q)]."
    );
    node.rabbitmqctl(&["eval", &forget]).await;
}

#[tokio::test]
async fn a_consumer_that_gets_nothing_although_the_queue_is_not_empty_says_so_and_consumes_anew() {
    let node = RabbitNode::start().await;
    let (queue_name, queue_type) = (QUEUE.to_owned(), QueueType::Classic);
    let queue = QueueConfig { queue_name, queue_type, amqp_ca: None };
    let config = Config { amqp_uri: node.amqp_uri().parse().unwrap(), queue };
    let publisher = connected(&config).await;
    let mut ours = consumer(&publisher, 10);
    let mut status = ours.status();
    publisher.publish_ids("c", &[1], PATIENCE).await.unwrap();
    next(&mut ours).await.settle(Disposition::Ack).await;
    assert!(status.borrow_and_update().is_ok());

    let waiting = tokio::spawn(async move { ours.next().await.id().unwrap() });
    forget_consumers(&node).await;
    publisher.publish_ids("c", &[2], PATIENCE).await.unwrap();
    let not = timeout(PATIENCE * 2, status.wait_for(Result::is_err)).await.unwrap();
    let reason = not.unwrap().clone().unwrap_err();
    assert!(reason.contains("nothing although the queue is not empty"), "{reason}");
    assert_eq!(timeout(PATIENCE, waiting).await.unwrap().unwrap(), 2);
    assert!(status.borrow().is_ok());
}
