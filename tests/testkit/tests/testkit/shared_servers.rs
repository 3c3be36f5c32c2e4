use sqlx::PgPool;
use testkit::{Database, Queue, amqp_uri, database_url};

use crate::infrastructure::declare;

#[tokio::test]
async fn queue_counts_returns_and_publishes_messages() {
    let queue = Queue::new();
    assert_eq!(queue.depth(&queue.name).await, None);
    declare(&amqp_uri(), &queue.name, "classic").await;
    assert_eq!(queue.depth(&queue.name).await, Some(0));
    assert!(queue.get(&queue.name).await.is_none());
    queue.publish_raw(b"{not json").await;
    assert_eq!(queue.depth(&queue.name).await, Some(1));
    let message = queue.get(&queue.name).await.unwrap();
    assert_eq!(message.delivery.data, b"{not json");
    assert_eq!(queue.depth(&queue.name).await, Some(0));
}

#[tokio::test]
#[should_panic(expected = "does not exist")]
async fn publishing_to_a_missing_queue_panics() {
    Queue::new().publish_raw(b"lost").await;
}

#[tokio::test]
async fn queues_are_deleted_after_a_test_that_panics() {
    let queue = Queue::new();
    let name = queue.name.clone();
    let names =
        [name.clone(), queue.dead(), format!("{name}.retry.2s"), format!("{name}.retry.60s")];
    for name in &names {
        declare(&amqp_uri(), name, "classic").await;
    }
    let test = async move {
        let queue = queue;
        assert_eq!(queue.depth(&queue.dead()).await, None, "it fails on purpose");
    };
    assert!(tokio::spawn(test).await.unwrap_err().is_panic());
    let observer = Queue::new();
    for name in names {
        assert_eq!(observer.depth(&name).await, None, "{name}");
    }
}

#[tokio::test]
async fn database_starts_empty_and_is_dropped_with_its_connections() {
    let database = Database::new().await;
    let sql = "SELECT current_database(), (SELECT count(*) FROM pg_stat_user_tables)";
    let (name, tables): (String, i64) =
        sqlx::query_as(sql).fetch_one(database.pool()).await.unwrap();
    assert!(name.starts_with("lastseen_test_"), "{name}");
    assert_eq!(tables, 0);
    assert!(database.url().ends_with(&name));
    assert!(database.environment().contains(&("POSTGRES_DB", name.clone())));
    let _held = database.pool().acquire().await.unwrap();
    drop(database);
    let admin = PgPool::connect(&database_url()).await.unwrap();
    let sql = "SELECT count(*) FROM pg_database WHERE datname = $1";
    let left: i64 = sqlx::query_scalar(sql).bind(name).fetch_one(&admin).await.unwrap();
    assert_eq!(left, 0);
}
