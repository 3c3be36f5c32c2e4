use sqlx::PgPool;
use store::{Failure, Sighting, Store};

use super::{ids, open};
use crate::{HOUR, seen};

async fn execute(pool: &PgPool, sql: &'static str) {
    sqlx::raw_sql(sql).execute(pool).await.unwrap();
}

fn batch() -> Vec<Sighting> {
    (1..=5).map(|id| seen(id, HOUR)).collect()
}

/// Asserts that the batch is rejected because of a row, and that no row is written.
async fn assert_rejected(store: &Store, pool: &PgPool, words: &str) {
    let error = store.record_seen(&batch()).await.unwrap_err();
    assert_eq!(error.failure(), Failure::RefusedRow, "{error:?}");
    assert!(error.to_string().contains(words), "{error}");
    assert_eq!(ids(pool).await, [0; 0]);
}

/// Asserts that the batch fails for a reason that concerns no single row.
async fn assert_failure(store: &Store, failure: Failure) {
    let error = store.record_seen(&batch()).await.unwrap_err();
    assert_eq!(error.failure(), failure, "{error:?}");
}

#[tokio::test]
async fn row_that_a_constraint_or_trigger_rejects_is_reported() {
    let (database, store) = open().await;
    let pool = database.pool();
    execute(pool, "ALTER TABLE object ADD CONSTRAINT not_three CHECK (id <> 3)").await;
    assert_rejected(&store, pool, "not_three").await;
    execute(
        pool,
        "ALTER TABLE object DROP CONSTRAINT not_three;
         CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN RAISE EXCEPTION 'never three'; END $$;
         CREATE TRIGGER refuse BEFORE INSERT ON object FOR EACH ROW WHEN (NEW.id = 3)
         EXECUTE FUNCTION refuse()",
    )
    .await;
    assert_rejected(&store, pool, "never three").await;
    execute(
        pool,
        "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
         $$ BEGIN NEW.id = NEW.id / 0; RETURN NEW; END $$",
    )
    .await;
    assert_rejected(&store, pool, "division by zero").await;
    execute(pool, "DROP TRIGGER refuse ON object").await;
    store.record_seen(&batch()).await.unwrap();
}

#[tokio::test]
async fn failure_of_every_row_does_not_count_as_a_rejected_row() {
    let (database, store) = open().await;
    let pool = database.pool();
    let name: String =
        sqlx::query_scalar("SELECT current_database()::text").fetch_one(pool).await.unwrap();
    let read_only = format!("ALTER DATABASE {name} SET default_transaction_read_only = on");
    execute(pool, "ALTER TABLE object RENAME TO elsewhere").await;
    assert_failure(&store, Failure::Database).await;
    execute(pool, "DROP TABLE IF EXISTS object; ALTER TABLE elsewhere RENAME TO object").await;
    sqlx::query(sqlx::AssertSqlSafe(read_only)).execute(pool).await.unwrap();
    let late = super::start(database.url(), 1);
    assert_failure(&late, Failure::Connection).await;
}
