//! The rows of the table, and the rows that rightly disappeared from it.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::PgPool;

/// The table of rows that rightly disappeared from `object`, with their age at the deletion. A row
/// that was lost with its whole database has no age.
const CREATE_GONE: &str = "CREATE TABLE gone (id bigint, committed_at float8, age_seconds float8)";

/// Records all deleted rows as gone.
const RECORD_DELETIONS: &str = "
    CREATE FUNCTION record_deletion() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO gone VALUES (
            OLD.id,
            extract(epoch FROM pg_xact_commit_timestamp(OLD.xmin)),
            extract(epoch FROM now() - OLD.last_seen));
        RETURN NULL;
    END $$;
    CREATE TRIGGER record_deletion AFTER DELETE ON object
        FOR EACH ROW EXECUTE FUNCTION record_deletion()";

const COMMITTED: &str = "
    SELECT id, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 FROM object
    UNION ALL SELECT id, committed_at FROM gone";

/// Prepares a new database for [`committed`].
pub(crate) async fn prepare(table: &PgPool) {
    sqlx::raw_sql(CREATE_GONE).execute(table).await.expect("a new database should accept a table");
}

/// Inserts rows of objects without callbacks, with the ids -2, -4 and so on.
pub(crate) async fn insert_foreign(table: &PgPool, count: i64) {
    let insert = "INSERT INTO object SELECT -2 * id, now() FROM generate_series(1, $1::bigint) id";
    let inserted = sqlx::query(insert).bind(count).execute(table).await;
    inserted.expect("the table should be writable");
}

/// The commit time of each row, including those that are gone.
pub(crate) async fn committed(table: &PgPool) -> HashMap<i64, SystemTime> {
    let rows: Vec<(i64, f64)> =
        sqlx::query_as(COMMITTED).fetch_all(table).await.expect("the table should be readable");
    rows.into_iter().map(|(id, at)| (id, UNIX_EPOCH + Duration::from_secs_f64(at))).collect()
}

pub(crate) async fn record_gone(table: &PgPool, rows: &HashMap<i64, SystemTime>) {
    let since_1970 = |at: &SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (ids, times): (Vec<i64>, Vec<f64>) =
        rows.iter().map(|(id, at)| (*id, since_1970(at).as_secs_f64())).unzip();
    let insert = "INSERT INTO gone SELECT * FROM unnest($1::bigint[], $2::float8[])";
    let inserted = sqlx::query(insert).bind(ids).bind(times).execute(table).await;
    inserted.expect("the new database should be writable");
}

/// Installs a trigger that records each deleted row as gone. The table must exist.
pub(crate) async fn record_deletions(table: &PgPool) {
    let installed = sqlx::raw_sql(RECORD_DELETIONS).execute(table).await;
    installed.expect("the table should accept a trigger");
}

/// The number of rows that have been deleted so far.
pub(crate) async fn deleted(table: &PgPool) -> i64 {
    let count = "SELECT count(*) FROM gone WHERE age_seconds IS NOT NULL";
    sqlx::query_scalar(count).fetch_one(table).await.expect("the table should be readable")
}

/// The ages of the youngest and the oldest deleted row at their deletion, by the database's clock.
pub(crate) async fn ages_when_deleted(table: &PgPool) -> Option<(Duration, Duration)> {
    let ages = "SELECT min(age_seconds), max(age_seconds) FROM gone";
    let (youngest, oldest): (Option<f64>, Option<f64>) =
        sqlx::query_as(ages).fetch_one(table).await.expect("the table should be readable");
    // A row that was deleted too early may have a `last_seen` in the future.
    let age = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
    Some((age(youngest?), age(oldest?)))
}

/// The age of the oldest row in the table, by the database's clock.
pub(crate) async fn oldest(table: &PgPool) -> Duration {
    let oldest = "SELECT extract(epoch FROM now() - min(last_seen))::float8 FROM object";
    let oldest: Option<f64> =
        sqlx::query_scalar(oldest).fetch_one(table).await.expect("the table should be readable");
    oldest.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).unwrap_or_default()
}
