use std::time::Duration;

use testkit::Database;

use super::{ids, open, start, wait_until_recorded};
use crate::{HOUR, delete_stale, ready, seen};

#[tokio::test]
async fn existing_table_is_used_unchanged() {
    let database = Database::new().await;
    let pool = database.pool();
    let table = "CREATE TABLE object (id bigint primary key, last_seen timestamptz)";
    sqlx::query(table).execute(pool).await.unwrap();
    let rows = "INSERT INTO object VALUES (1, now() - interval '2 h'), (2, now()), (4, NULL)";
    sqlx::query(rows).execute(pool).await.unwrap();
    let identity = "SELECT 'object'::regclass::oid::int8";
    let before: i64 = sqlx::query_scalar(identity).fetch_one(pool).await.unwrap();

    let store = start(database.url(), 1);
    ready(&store).await;
    store.record_seen(&[seen(3, Duration::ZERO), seen(4, Duration::ZERO)]).await.unwrap();
    assert_eq!(delete_stale(&store, HOUR, 100).await.unwrap(), 1);
    assert_eq!(ids(pool).await, [2, 3, 4]);
    let nulls = "SELECT count(*) FROM object WHERE last_seen IS NULL";
    assert_eq!(sqlx::query_scalar::<_, i64>(nulls).fetch_one(pool).await.unwrap(), 0);
    assert_eq!(sqlx::query_scalar::<_, i64>(identity).fetch_one(pool).await.unwrap(), before);
}

#[tokio::test]
async fn schema_is_created_again_when_the_database_is_set_up_anew() {
    is_created_again_after(&["DROP SCHEMA public CASCADE", "CREATE SCHEMA public"]).await;
}

#[tokio::test]
async fn table_is_created_again_when_it_alone_was_dropped() {
    is_created_again_after(&["DROP TABLE object"]).await;
}

async fn is_created_again_after(loss: &[&'static str]) {
    let (database, store) = open().await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    for &sql in loss {
        sqlx::query(sql).execute(database.pool()).await.unwrap();
    }
    assert!(store.record_seen(&[seen(2, HOUR)]).await.is_err());
    wait_until_recorded(&store, seen(3, HOUR)).await;
    ready(&store).await;
    assert_eq!(ids(database.pool()).await, [3]);
    assert_eq!(delete_stale(&store, HOUR / 2, 10).await.unwrap(), 1);
}

/// Field case 4.1.
#[tokio::test]
async fn migrations_table_of_another_application_is_left_unchanged() {
    let database = Database::new().await;
    let pool = database.pool();
    let other = "CREATE TABLE _sqlx_migrations (version bigint PRIMARY KEY, description text);
                  INSERT INTO _sqlx_migrations VALUES (1, 'theirs')";
    sqlx::raw_sql(other).execute(pool).await.unwrap();
    let store = start(database.url(), 1);
    ready(&store).await;
    sqlx::raw_sql("DROP TABLE object").execute(pool).await.unwrap();
    wait_until_recorded(&store, seen(1, HOUR)).await;
    let kept = "SELECT description FROM _sqlx_migrations";
    assert_eq!(sqlx::query_scalar::<_, String>(kept).fetch_all(pool).await.unwrap(), ["theirs"]);
}

/// Field case 4.1: older versions recorded migrations in `_sqlx_migrations`.
#[tokio::test]
async fn installation_of_an_older_version_is_migrated() {
    let database = Database::new().await;
    let pool = database.pool();
    let before = "
        CREATE TABLE object (id bigint PRIMARY KEY, last_seen timestamptz NOT NULL)
            WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
        INSERT INTO object VALUES (1, now());
        CREATE TABLE _sqlx_migrations (
            version BIGINT PRIMARY KEY,
            description TEXT NOT NULL,
            installed_on TIMESTAMPTZ NOT NULL DEFAULT now(),
            success BOOLEAN NOT NULL,
            checksum BYTEA NOT NULL,
            execution_time BIGINT NOT NULL);
        INSERT INTO _sqlx_migrations VALUES (20261121000001, 'object', now(), true, decode('00', 'hex'), 1)";
    sqlx::raw_sql(before).execute(pool).await.unwrap();
    let store = start(database.url(), 1);
    ready(&store).await;
    store.record_seen(&[seen(2, Duration::ZERO)]).await.unwrap();
    assert_eq!(ids(pool).await, [1, 2]);
    let versions = "SELECT version FROM _lastseen_migrations";
    let versions: Vec<i64> = sqlx::query_scalar(versions).fetch_all(pool).await.unwrap();
    assert_eq!(versions, [20_261_121_000_001, 20_261_130_000_001]);
}
