use std::time::Duration;

use lapin::BasicProperties;
use lapin::options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use testkit::{PostgresCluster, Queue, RabbitNode, connect, wait_for};

const DEADLINE: Duration = Duration::from_secs(30);

/// Declares a durable queue of this type, such as `quorum`.
pub(crate) async fn declare(uri: &str, name: &str, queue_type: &str) {
    let channel = connect(uri).await.unwrap().create_channel().await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..Default::default() };
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(queue_type.into()));
    channel.queue_declare(name.into(), durable, arguments).await.unwrap();
}

#[tokio::test]
async fn durable_message_survives_a_kill_of_the_rabbit_node() {
    let mut node = RabbitNode::start().await;
    let queue = Queue::on(&node.amqp_uri());
    declare(&node.amqp_uri(), &queue.name, "quorum").await;
    queue.publish_raw(b"kept").await;

    node.kill().await;
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", node.amqp_port())).await.is_err());
    node.boot().await;
    let message = wait_for("the message", async || queue.get(&queue.name).await).await;
    assert_eq!(message.delivery.data, b"kept");

    queue.publish_raw(b"kept as well").await;
    node.restart().await;
    let message = wait_for("the message", async || queue.get(&queue.name).await).await;
    assert_eq!(message.delivery.data, b"kept as well");
}

#[tokio::test]
async fn rabbit_cluster_survives_the_loss_of_any_one_node() {
    let mut nodes = RabbitNode::start_cluster().await;
    let queue = Queue::on(&nodes[1].amqp_uri());
    declare(&nodes[0].amqp_uri(), &queue.name, "quorum").await;
    nodes[0].kill().await;
    queue.publish_raw(b"kept").await;
    nodes[0].boot().await;
    nodes[2].kill().await;
    let mut other = Queue::on(&nodes[0].amqp_uri());
    other.name.clone_from(&queue.name);
    let get = async || other.try_get(&queue.name).await.ok().flatten();
    let message = wait_for("the message", get).await;
    assert_eq!(message.delivery.data, b"kept");
}

#[tokio::test]
async fn rabbit_node_with_a_memory_alarm_confirms_nothing() {
    let node = RabbitNode::start().await;
    let queue = Queue::on(&node.amqp_uri());
    declare(&node.amqp_uri(), &queue.name, "quorum").await;
    let connection = connect(&node.amqp_uri()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();

    node.set_memory_alarm(true).await;
    let options = BasicPublishOptions::default();
    let name = queue.name.as_str().into();
    let published =
        channel.basic_publish("".into(), name, options, b"late", BasicProperties::default());
    let mut confirm = Box::pin(async { published.await.unwrap().await.unwrap() });
    assert!(tokio::time::timeout(Duration::from_secs(1), &mut confirm).await.is_err());

    node.set_memory_alarm(false).await;
    assert!(tokio::time::timeout(DEADLINE, confirm).await.unwrap().is_ack());
}

#[tokio::test]
async fn committed_row_survives_a_kill_of_the_postgres_cluster() {
    let mut cluster = PostgresCluster::start().await;
    sqlx::query("CREATE TABLE kept (id bigint)").execute(cluster.pool()).await.unwrap();
    sqlx::query("INSERT INTO kept VALUES (42)").execute(cluster.pool()).await.unwrap();
    let busy = cluster.pool().clone();
    let busy =
        tokio::spawn(
            async move { sqlx::query("SELECT pg_sleep(600)").execute(&busy).await.map(drop) },
        );
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)'";
    wait_for("the backend is busy", async || {
        let busy: i64 = sqlx::query_scalar(sql).fetch_one(cluster.pool()).await.ok()?;
        (busy == 1).then_some(())
    })
    .await;

    cluster.kill().await;
    assert!(tokio::time::timeout(DEADLINE, busy).await.unwrap().unwrap().is_err());
    assert!(tokio::net::TcpStream::connect(("127.0.0.1", cluster.port())).await.is_err());
    cluster.boot().await;
    let row = wait_for("the row", async || {
        sqlx::query_scalar::<_, i64>("SELECT id FROM kept").fetch_one(cluster.pool()).await.ok()
    });
    assert_eq!(row.await, 42);
}

#[tokio::test]
async fn postgres_cluster_can_be_replaced_with_an_empty_one() {
    let mut cluster = PostgresCluster::start().await;
    sqlx::query("CREATE TABLE kept (id bigint)").execute(cluster.pool()).await.unwrap();
    cluster.stop_immediately().await;
    let mut former = cluster.replace().await;
    assert_ne!(former.port(), cluster.port());
    former.boot().await;
    cluster.boot().await;
    for (cluster, tables) in [(&former, 1), (&cluster, 0)] {
        let sql = "SELECT count(*) FROM pg_tables WHERE tablename = 'kept'";
        let found: i64 = sqlx::query_scalar(sql).fetch_one(cluster.pool()).await.unwrap();
        assert_eq!(found, tables);
    }
}

#[tokio::test]
async fn postgres_cluster_with_a_full_disk_rejects_rows() {
    let cluster = PostgresCluster::start_on_a_small_disk().await;
    sqlx::query("CREATE TABLE rows (id bigint)").execute(cluster.pool()).await.unwrap();
    cluster.fill_small_disk().await;
    let insert = || sqlx::query("INSERT INTO rows VALUES (1)").execute(cluster.pool());
    let refused = insert().await.unwrap_err().to_string();
    assert!(refused.contains("No space left on device"), "{refused}");
    cluster.clear_small_disk().await;
    insert().await.unwrap();
}
