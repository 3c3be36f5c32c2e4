//! What is in the table, and what was and rightly is not any more.

use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::PgPool;

/// Holds what is no longer in `object` through no fault of ours. A row's age is that at its deletion;
/// one that went with its whole database has none.
const CREATE_GONE: &str = "CREATE TABLE gone (id bigint, committed_at float8, age_seconds float8)";

/// From now on, what is deleted is noted as gone.
const RECORD_DELETIONS: &str = "
    CREATE FUNCTION note_deletion() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO gone VALUES (
            OLD.id,
            extract(epoch FROM pg_xact_commit_timestamp(OLD.xmin)),
            extract(epoch FROM now() - OLD.last_seen));
        RETURN NULL;
    END $$;
    CREATE TRIGGER note_deletion AFTER DELETE ON object FOR EACH ROW EXECUTE FUNCTION note_deletion()";

const COMMITTED: &str = "
    SELECT id, extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 FROM object
    UNION ALL SELECT id, committed_at FROM gone";

/// Prepares a new database for [`committed`].
pub(crate) async fn prepare(table: &PgPool) {
    sqlx::raw_sql(CREATE_GONE).execute(table).await.expect("a new database should take a table");
}

/// Adds rows of objects that no callback is about: their ids are -2, -4 and so on.
pub(crate) async fn insert_foreign(table: &PgPool, count: i64) {
    let insert = "INSERT INTO object SELECT -2 * id, now() FROM generate_series(1, $1::bigint) id";
    let inserted = sqlx::query(insert).bind(count).execute(table).await;
    inserted.expect("the table should be writable");
}

/// When each row was committed, those that are gone included.
pub(crate) async fn committed(table: &PgPool) -> HashMap<i64, SystemTime> {
    let rows: Vec<(i64, f64)> =
        sqlx::query_as(COMMITTED).fetch_all(table).await.expect("the table should be readable");
    rows.into_iter().map(|(id, at)| (id, UNIX_EPOCH + Duration::from_secs_f64(at))).collect()
}

/// Notes rows as gone.
pub(crate) async fn record_gone(table: &PgPool, rows: &HashMap<i64, SystemTime>) {
    let since_1970 = |at: &SystemTime| at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (ids, times): (Vec<i64>, Vec<f64>) =
        rows.iter().map(|(id, at)| (*id, since_1970(at).as_secs_f64())).unzip();
    let note = "INSERT INTO gone SELECT * FROM unnest($1::bigint[], $2::float8[])";
    let noted = sqlx::query(note).bind(ids).bind(times).execute(table).await;
    noted.expect("the new database should be writable");
}

/// Has each row noted as gone when it is deleted. There must be a table.
pub(crate) async fn record_deletions(table: &PgPool) {
    let noted = sqlx::raw_sql(RECORD_DELETIONS).execute(table).await;
    noted.expect("the table should take a trigger");
}

/// How many rows have been deleted so far.
pub(crate) async fn deleted(table: &PgPool) -> i64 {
    let count = "SELECT count(*) FROM gone WHERE age_seconds IS NOT NULL";
    sqlx::query_scalar(count).fetch_one(table).await.expect("the table should be readable")
}

/// How old the deleted rows were, by the database's clock: the youngest and the oldest.
pub(crate) async fn ages_when_deleted(table: &PgPool) -> Option<(Duration, Duration)> {
    let ages = "SELECT min(age_seconds), max(age_seconds) FROM gone";
    let (youngest, oldest): (Option<f64>, Option<f64>) =
        sqlx::query_as(ages).fetch_one(table).await.expect("the table should be readable");
    // A row that was deleted before its time may have been seen in the future.
    let age = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
    Some((age(youngest?), age(oldest?)))
}

/// How old the oldest row in the table is, by the database's clock.
pub(crate) async fn oldest(table: &PgPool) -> Duration {
    let oldest = "SELECT extract(epoch FROM now() - min(last_seen))::float8 FROM object";
    let oldest: Option<f64> =
        sqlx::query_scalar(oldest).fetch_one(table).await.expect("the table should be readable");
    oldest.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).unwrap_or_default()
}
