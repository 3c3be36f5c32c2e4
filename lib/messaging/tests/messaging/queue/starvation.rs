//! A RabbitMQ that delivers nothing to a waiting consumer although the queue is not empty.

use std::collections::HashSet;

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueuePurgeOptions};
use messaging::queue::{Consumer, DeadLetterAction, Delivery, Disposition, QueueType};
use runtime::Status;
use testkit::{RabbitNode, wait_until};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::queue::test_queue::{PATIENCE, config_at, connected, consumer, process_all};

const QUEUE: &str = "objects";

/// Makes the classic queue forget its consumers, without informing their channels or clients.
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

/// Like [`forget_consumers`], for a quorum queue.
async fn forget_consumers_of_quorum_queue(node: &RabbitNode, queue: &str) {
    let forget = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)), \
         Cancel = fun(Channel, Tag) -> rabbit_fifo:make_checkout({{Tag, Channel}}, cancel, #{{}}) end, \
         [_ | _] = [{{ok, _, _}} = ra:process_command(amqqueue:get_pid(Q), Cancel(element(1, C), element(2, C))) \
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
async fn wait_until_starving(status: &mut watch::Receiver<Status>) {
    let status = timeout(PATIENCE * 2, status.wait_for(Result::is_err)).await.unwrap();
    let reason = status.unwrap().clone().unwrap_err();
    assert!(reason.contains("nothing although the queue is not empty"), "{reason}");
}

async fn wait_until_healthy(status: &mut watch::Receiver<Status>) {
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
}

#[tokio::test]
async fn starving_consumer_reports_it_and_starts_a_new_session() {
    let node = RabbitNode::start().await;
    let publisher = connected(&config_at(&node.amqp_uri(), QUEUE, QueueType::Classic)).await;
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
    let (_connection, other) = crate::channel(&node.amqp_uri()).await;
    forget_consumers(&node).await;
    publish(3).await;
    wait_until_starving(&mut status).await;
    other.queue_purge(QUEUE.into(), QueuePurgeOptions::default()).await.unwrap();
    wait_until_healthy(&mut status).await;
    publish(4).await;
    while ack_one(&mut deliveries).await != 4 {}
}

/// While another shard delivers, the consumer never waits for long.
#[tokio::test]
async fn shard_that_lost_its_consumers_delivers_again() {
    let node = RabbitNode::start().await;
    let mut config = config_at(&node.amqp_uri(), QUEUE, QueueType::Quorum);
    config.queue.shards = 2;
    let publisher = connected(&config).await;
    let publish = async |ids: &[i64]| publisher.publish_ids("c", ids, PATIENCE).await.unwrap();
    let mut deliveries = consume(consumer(&publisher, 10));
    publish(&[0]).await;
    assert_eq!(ack_one(&mut deliveries).await, 0);

    forget_consumers_of_quorum_queue(&node, &format!("{QUEUE}.0")).await;
    let ids: Vec<i64> = (0..20).collect();
    publish(&ids).await;
    let of_other_shard = ack_one(&mut deliveries).await;
    let mut missing: HashSet<i64> = ids.into_iter().collect();
    wait_until("the consumer has received all messages", async || {
        publish(&[of_other_shard]).await;
        missing.remove(&ack_one(&mut deliveries).await);
        missing.is_empty()
    })
    .await;
}

/// Suspends the leader of a quorum queue for two seconds.
async fn suspend_leader(node: &RabbitNode, queue: &str) {
    let suspend = format!(
        "{{ok, Q}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<\"/\">>, queue, <<\"{queue}\">>)), \
         Leader = amqqueue:get_pid(Q), \
         ok = sys:suspend(Leader), \
         spawn(fun() -> timer:sleep(2000), sys:resume(Leader) end)."
    );
    node.rabbitmqctl(&["eval", &suspend]).await;
}

/// Meanwhile, RabbitMQ responds to a passive declaration that the queue is empty.
#[tokio::test]
async fn dead_letters_of_a_slow_queue_are_listed() {
    let node = RabbitNode::start().await;
    let config = config_at(&node.amqp_uri(), QUEUE, QueueType::Quorum);
    connected(&config).await.close().await;
    let dead = format!("{QUEUE}.dead");
    let (_connection, channel) = crate::channel(&node.amqp_uri()).await;
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let options = BasicPublishOptions::default();
    let letter = BasicProperties::default();
    let sent = channel.basic_publish("".into(), dead.clone().into(), options, b"{}", letter);
    sent.await.unwrap().await.unwrap();

    suspend_leader(&node, &dead).await;
    assert_eq!(process_all(&config, DeadLetterAction::List).await.len(), 1);
    suspend_leader(&node, &dead).await;
    assert_eq!(process_all(&config, DeadLetterAction::Purge).await.len(), 1);
}
