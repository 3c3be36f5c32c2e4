use std::time::Duration;

use testbed::{Database, eventually};

use super::{ids, open, start};
use crate::{DEADLINE, HOUR, delete_stale, ready, seen};

#[tokio::test]
async fn a_table_that_the_go_services_made_is_used_as_it_is() {
    let database = Database::new().await;
    let pool = database.pool();
    let go = "CREATE TABLE object (id bigint primary key, last_seen timestamptz)";
    sqlx::query(go).execute(pool).await.unwrap();
    let rows = "INSERT INTO object VALUES (1, now() - interval '2 h'), (2, now()), (4, NULL)";
    sqlx::query(rows).execute(pool).await.unwrap();
    let identity = "SELECT 'object'::regclass::oid::int8";
    let table: i64 = sqlx::query_scalar(identity).fetch_one(pool).await.unwrap();

    let store = start(database.url(), 1);
    ready(&store).await;
    store.record_seen(&[seen(3, Duration::ZERO), seen(4, Duration::ZERO)]).await.unwrap();
    assert_eq!(delete_stale(&store, HOUR, 100).await.unwrap(), 1);
    assert_eq!(ids(pool).await, [2, 3, 4]);
    let nulls = "SELECT count(*) FROM object WHERE last_seen IS NULL";
    assert_eq!(sqlx::query_scalar::<_, i64>(nulls).fetch_one(pool).await.unwrap(), 0);
    assert_eq!(sqlx::query_scalar::<_, i64>(identity).fetch_one(pool).await.unwrap(), table);
}

#[tokio::test]
async fn the_schema_comes_back_when_the_database_is_set_up_anew() {
    comes_back_after(&["DROP SCHEMA public CASCADE", "CREATE SCHEMA public"]).await;
}

#[tokio::test]
async fn the_table_comes_back_when_it_alone_was_dropped() {
    comes_back_after(&["DROP TABLE object"]).await;
}

async fn comes_back_after(loss: &[&'static str]) {
    let (database, store) = open().await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    for &sql in loss {
        sqlx::query(sql).execute(database.pool()).await.unwrap();
    }
    assert!(store.record_seen(&[seen(2, HOUR)]).await.is_err());
    eventually("sightings are recorded again", DEADLINE, async || {
        store.record_seen(&[seen(3, HOUR)]).await.ok()
    })
    .await;
    ready(&store).await;
    assert_eq!(ids(database.pool()).await, [3]);
    assert_eq!(delete_stale(&store, HOUR / 2, 10).await.unwrap(), 1);
}
