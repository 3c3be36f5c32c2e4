//! Tests with the Go services' table: `INTEGER, TIMESTAMP`, with local times of `TZ`. Field case
//! 4.3.

#![expect(
    clippy::duration_suboptimal_units,
    clippy::unchecked_time_subtraction,
    reason = "the moments are seconds since 1970, and far from zero"
)]

use std::time::{Duration, SystemTime};

use sqlx::PgPool;
use store::{Config, Objects, Store, StoreError};
use testkit::{Database, DatabaseClock, GO_TABLE, wait_until};

use super::start_with;
use crate::{DEADLINE, HOUR, delete_stale, ready, seen, unready};

/// 2027-10-31 01:00 UTC, when the clocks in Berlin go back from 03:00 to 02:00.
const AUTUMN: Duration = Duration::from_secs(1_824_944_400);
/// 2027-03-28 01:00 UTC, when the clocks in Berlin go forward from 02:00 to 03:00.
const SPRING: Duration = Duration::from_secs(1_806_195_600);

const SECOND: Duration = Duration::from_secs(1);
const TTL: Duration = Duration::from_secs(30);

/// A database with the table of the Go services.
async fn go_database() -> Database {
    let database = Database::new().await;
    sqlx::raw_sql(GO_TABLE).execute(database.pool()).await.unwrap();
    database
}

fn berlin(database: &Database) -> Config {
    let tz = Some("Europe/Berlin".parse().unwrap());
    Config { tz, ..Config::at(database.url().parse().unwrap()) }
}

async fn store(config: &Config) -> Store {
    let store = start_with(config, 2);
    ready(&store).await;
    store
}

async fn age(config: &Config, id: i64) -> Duration {
    let mut objects = Objects::open(config).await.unwrap();
    let page = objects.page(Some(id - 1), 1).await.unwrap();
    assert_eq!(page[0].id, id);
    page[0].age
}

async fn set(clock: &DatabaseClock, to: Duration) {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    clock.set_ahead(to.checked_sub(now).unwrap()).await;
}

#[tokio::test]
async fn go_services_table_is_used_unchanged() {
    let database = go_database().await;
    let pool = database.pool();
    let identity = "SELECT 'object'::regclass::oid::int8";
    let before: i64 = sqlx::query_scalar(identity).fetch_one(pool).await.unwrap();
    // A row of the Go consumer.
    let row = "INSERT INTO object VALUES (1, now() AT TIME ZONE 'Europe/Berlin' - interval '2 h')";
    sqlx::raw_sql(row).execute(pool).await.unwrap();

    let config = berlin(&database);
    let store = store(&config).await;
    let recorded = store.record_seen(&[seen(1, HOUR), seen(2, Duration::ZERO)]).await.unwrap();
    assert_eq!((recorded.inserted[0].id, recorded.updated[0].id), (2, 1));
    let local = "SELECT extract(epoch FROM now() AT TIME ZONE 'Europe/Berlin' - last_seen)::float8
                 FROM object WHERE id = 2";
    let local_age: f64 = sqlx::query_scalar(local).fetch_one(pool).await.unwrap();
    assert!((0.0..60.0).contains(&local_age), "{local_age}");

    let mut objects = Objects::open(&config).await.unwrap();
    let page = objects.page(None, 10).await.unwrap();
    assert_eq!(page.iter().map(|object| object.id).collect::<Vec<_>>(), [1, 2]);
    assert!(page[0].age >= HOUR && page[0].age < HOUR + DEADLINE, "{page:?}");
    assert_eq!(page[1].last_seen, recorded.inserted[0].last_seen.time());
    assert_eq!(objects.page(Some(i64::from(i32::MAX)), 10).await.unwrap(), []);
    assert_eq!(objects.count().await.unwrap(), 2);

    let now = store.now().await.unwrap();
    let gone = store.delete_stale(now.before(HOUR / 2), 100).await.unwrap();
    assert_eq!(gone, [recorded.updated[0]]);
    assert_eq!(objects.count().await.unwrap(), 1);
    let after: i64 = sqlx::query_scalar(identity).fetch_one(pool).await.unwrap();
    assert_eq!(before, after);
    let types: Vec<String> = sqlx::query_scalar(
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute
         WHERE attrelid = 'object'::regclass AND attnum > 0 ORDER BY attnum",
    )
    .fetch_all(pool)
    .await
    .unwrap();
    assert_eq!(types, ["integer", "timestamp without time zone"]);
}

#[tokio::test]
async fn id_beyond_32_bits_is_a_rejected_row_of_an_integer_column() {
    let database = go_database().await;
    let store = store(&berlin(&database)).await;
    let too_large = i64::from(i32::MAX) + 1;
    let batch = [seen(1, Duration::ZERO), seen(too_large, Duration::ZERO)];
    let error = store.record_seen(&batch).await.unwrap_err();
    assert_eq!(error.failure(), store::Failure::RefusedRow, "{error:?}");
    store.record_seen(&batch[..1]).await.unwrap();
    assert_eq!(delete_stale(&store, HOUR, 10).await.unwrap(), 0);
}

/// A row lives for the TTL, whether it is written before, in or after the hour that local time
/// repeats.
#[tokio::test]
async fn rows_live_for_their_ttl_when_the_clocks_go_back() {
    let database = go_database().await;
    let clock = DatabaseClock::install(database.pool()).await;
    let config = berlin(&database);
    set(&clock, AUTUMN - 2 * HOUR).await;
    let store = store(&config).await;
    let minute = 60 * SECOND;
    let written_at = [
        AUTUMN - HOUR - 10 * SECOND,
        AUTUMN - HOUR + minute,
        AUTUMN - 30 * minute,
        AUTUMN - 10 * SECOND,
        AUTUMN + SECOND,
        AUTUMN + 30 * minute,
        AUTUMN + HOUR - 10 * SECOND,
        AUTUMN + HOUR + 10 * SECOND,
    ];
    for (id, at) in (1..).zip(written_at) {
        set(&clock, at).await;
        let recorded = store.record_seen(&[seen(id, Duration::ZERO)]).await.unwrap();
        assert_eq!(recorded.inserted.len(), 1);
        // The range allows for the time that the test takes.
        set(&clock, at + 15 * SECOND).await;
        let now_old = age(&config, id).await;
        assert!((14 * SECOND..20 * SECOND).contains(&now_old), "{id}: {now_old:?}");
        assert_eq!(delete_stale(&store, TTL, 10).await.unwrap(), 0, "{id} is not stale yet");
        assert_eq!(store.correct_future(10).await.unwrap(), 0, "{id} is not in the future");

        // The object is seen again 15 s later, perhaps after the change of the clocks.
        let again = store.record_seen(&[seen(id, Duration::ZERO)]).await.unwrap();
        assert_eq!(again.updated.len(), 1, "{id} does not move forward");
        set(&clock, at + 40 * SECOND).await;
        assert_eq!(delete_stale(&store, TTL, 10).await.unwrap(), 0, "{id} was seen 25 s ago");
        set(&clock, at + 50 * SECOND).await;
        assert_eq!(delete_stale(&store, TTL, 10).await.unwrap(), 1, "{id} is stale");
    }
}

#[tokio::test]
async fn rows_live_for_their_ttl_when_the_clocks_go_forward() {
    let database = go_database().await;
    let clock = DatabaseClock::install(database.pool()).await;
    let config = berlin(&database);
    set(&clock, SPRING - 10 * SECOND).await;
    let store = store(&config).await;
    store.record_seen(&[seen(1, Duration::ZERO)]).await.unwrap();
    set(&clock, SPRING + 5 * SECOND).await;
    assert!(age(&config, 1).await < 20 * SECOND);
    assert_eq!(delete_stale(&store, TTL, 10).await.unwrap(), 0);
    assert_eq!(store.record_seen(&[seen(1, Duration::ZERO)]).await.unwrap().updated.len(), 1);
    set(&clock, SPRING + 40 * SECOND).await;
    assert_eq!(delete_stale(&store, TTL, 10).await.unwrap(), 1);
}

#[tokio::test]
async fn unusable_table_is_reported_with_the_reason() {
    let tables = [
        ("(id text PRIMARY KEY, last_seen timestamptz)", "column id has the type text"),
        ("(id uuid PRIMARY KEY, last_seen timestamptz)", "column id has the type uuid"),
        ("(id bigint PRIMARY KEY, last_seen bigint)", "column last_seen has the type bigint"),
        ("(id bigint PRIMARY KEY, last_seen date)", "column last_seen has the type date"),
        ("(id bigint PRIMARY KEY, seen timestamptz)", "it has no column last_seen"),
        ("(id bigint, last_seen timestamptz)", "column id must be the primary key"),
        (
            "(id bigint, last_seen timestamptz, PRIMARY KEY (id, last_seen))",
            "column id must be the primary key",
        ),
        (
            "(id bigint PRIMARY KEY, last_seen timestamptz, name text NOT NULL)",
            "column name must have a default",
        ),
        (
            "(id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, last_seen timestamptz)",
            "column id is generated",
        ),
        (
            "(id bigint PRIMARY KEY, last_seen timestamptz) PARTITION BY RANGE (id)",
            "not an ordinary table",
        ),
    ];
    let database = Database::new().await;
    for (columns, reason) in tables {
        replace_table(database.pool(), columns).await;
        let config = berlin(&database);
        unready(&start_with(&config, 1), reason).await;
        let error = Objects::open(&config).await.err().unwrap();
        assert!(error.to_string().contains(reason), "{columns}: {error}");
    }
}

#[tokio::test]
async fn table_with_narrow_or_more_columns_works() {
    let database = Database::new().await;
    for columns in [
        "(id smallint PRIMARY KEY, last_seen timestamp(0))",
        "(name text DEFAULT 'x' NOT NULL, last_seen timestamptz(3), id integer UNIQUE NOT NULL)",
    ] {
        replace_table(database.pool(), columns).await;
        let store = store(&berlin(&database)).await;
        store.record_seen(&[seen(1, HOUR), seen(2, Duration::ZERO)]).await.unwrap();
        assert_eq!(delete_stale(&store, HOUR / 2, 10).await.unwrap(), 1, "{columns}");
    }
}

async fn replace_table(pool: &PgPool, columns: &str) {
    let sql = format!("DROP TABLE IF EXISTS object; CREATE TABLE object {columns}");
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(pool).await.unwrap();
}

#[tokio::test]
async fn unknown_time_zone_is_a_session_error_and_rejects_no_row() {
    let database = go_database().await;
    let tz = Some("Mars/Base".parse().unwrap());
    let store = start_with(&Config { tz, ..berlin(&database) }, 1);
    unready(&store, "Mars/Base").await;
    let error = store.record_seen(&[seen(1, HOUR)]).await.unwrap_err();
    assert!(matches!(error, StoreError::Session(_)), "{error:?}");
}

/// Field case 4.4.
#[tokio::test]
async fn rows_dated_in_the_future_count_as_seen_now() {
    let database = Database::new().await;
    for columns in [
        "(id integer PRIMARY KEY, last_seen timestamp)",
        "(id bigint PRIMARY KEY, last_seen timestamptz)",
    ] {
        replace_table(database.pool(), columns).await;
        let rows = "INSERT INTO object VALUES
            (1, now() + interval '2 days'), (2, 'infinity'), (3, '294276-12-31 23:59:59'),
            (4, now()), (5, now() + interval '2 days'), (6, '4713-11-24 BC'), (7, '-infinity')";
        sqlx::raw_sql(rows).execute(database.pool()).await.unwrap();
        let config = berlin(&database);
        let store = store(&config).await;
        let mut objects = Objects::open(&config).await.unwrap();
        let page = objects.page(None, 10).await.unwrap();
        assert_eq!(page.len(), 7);
        assert!(page[..3].iter().all(|object| object.age.is_zero()), "{page:?}");
        assert_eq!(page[5].last_seen, SystemTime::UNIX_EPOCH);

        let recorded = store.record_seen(&[seen(5, Duration::ZERO)]).await.unwrap();
        assert_eq!(recorded.updated.len(), 1);
        assert_eq!(delete_stale(&store, 2 * HOUR, 10).await.unwrap(), 2);
        assert_eq!(store.correct_future(2).await.unwrap(), 2);
        assert_eq!(store.correct_future(10).await.unwrap(), 1);
        assert_eq!(store.correct_future(10).await.unwrap(), 0);
        assert_eq!(objects.count().await.unwrap(), 5);
        // All remaining rows become stale in the end.
        let mut deleted = 0;
        wait_until("all rows become stale", async || {
            deleted += delete_stale(&store, Duration::from_millis(1), 10).await.unwrap();
            deleted == 5
        })
        .await;
    }
}
