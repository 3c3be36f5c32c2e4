use store::{Objects, StoreError};
use testkit::{Database, free_port};

use super::config;

#[tokio::test]
async fn refused_connection_is_reported_as_the_reason() {
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres", free_port());
    let Err(error) = Objects::open(&config(&url)).await else { panic!("connected to nothing") };
    assert!(matches!(error, StoreError::Connect(_)), "{error:?}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn reader_does_not_create_a_missing_table() {
    let database = Database::new().await;
    let mut objects = Objects::open(&config(database.url())).await.unwrap();
    assert!(matches!(objects.count().await, Err(StoreError::Count(_))));
    assert!(matches!(objects.page(None, 10).await, Err(StoreError::List(_))));
    let tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'";
    let tables: i64 = sqlx::query_scalar(tables).fetch_one(database.pool()).await.unwrap();
    assert_eq!(tables, 0);
}

#[tokio::test]
async fn row_without_a_time_is_omitted() {
    let database = Database::new().await;
    let table = "CREATE TABLE object (id bigint primary key, last_seen timestamptz)";
    sqlx::query(table).execute(database.pool()).await.unwrap();
    let rows =
        "INSERT INTO object VALUES (1, NULL), (2, now()), (3, 'infinity'), (4, '1066-10-14')";
    sqlx::query(rows).execute(database.pool()).await.unwrap();
    let mut objects = Objects::open(&config(database.url())).await.unwrap();
    let page = objects.page(None, 10).await.unwrap();
    assert_eq!(page.iter().map(|object| object.id).collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!(objects.count().await.unwrap(), 3);
}
