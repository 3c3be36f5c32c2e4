//! Tests the routine with a real Postgres, within the test process and as a separate process.

#![expect(clippy::unwrap_used, reason = "test helpers may panic, too")]

use std::time::{Duration, Instant};

use messaging::amqp::Access;
use messaging::events::{Exchange, Kind, Notification, Subscriber};
use sqlx::PgPool;
use testkit::{
    Database, DatabaseClock, InProcess, PATIENCE, Process, Proxy, Queue, wait_for, wait_until,
};
use tokio::time::timeout;

const HOUR: Duration = Duration::from_hours(1);

/// Starts a routine within the test process, which cleans up every 20 ms.
fn start(database_url: &str, flags: &[&str]) -> InProcess<routine::Config> {
    let url = format!("--database-url={database_url}");
    let defaults = [&url, "--object-ttl=1h", "--routine-interval=20ms"];
    let flags = defaults.iter().chain(flags).map(|&flag| flag.to_owned()).collect();
    InProcess::start(routine::run, flags)
}

/// Waits for the first successful cleanup. After it, a mostly stale table causes no pause.
async fn cleaned_once(pool: &PgPool) {
    // One of two rows is fresh, so that the table is not mostly stale and this cleanup not paused.
    insert(pool, -1..=-1, "1 s").await;
    insert(pool, -2..=-2, "2 h").await;
    wait_until("the first cleanup", async || !ids(pool).await.contains(&-2)).await;
    sqlx::query("DELETE FROM object WHERE id = -1").execute(pool).await.unwrap();
}

/// A database with the table of the Go services.
async fn database() -> Database {
    let database = Database::new().await;
    let table = "CREATE TABLE object (id bigint PRIMARY KEY, last_seen timestamptz)";
    sqlx::query(table).execute(database.pool()).await.unwrap();
    database
}

/// Inserts rows with these ids, last seen `age` (a Postgres interval) ago.
async fn insert(pool: &PgPool, ids: std::ops::RangeInclusive<i64>, age: &str) {
    let sql = "INSERT INTO object SELECT id, pg_catalog.now() - $3::text::interval
               FROM generate_series($1, $2) AS id ON CONFLICT DO NOTHING";
    let query = sqlx::query(sql).bind(ids.start()).bind(ids.end()).bind(age);
    query.execute(pool).await.unwrap();
}

async fn ids(pool: &PgPool) -> Vec<i64> {
    sqlx::query_scalar("SELECT id FROM object ORDER BY id").fetch_all(pool).await.unwrap()
}

async fn only_is_left(pool: &PgPool, expected: &[i64]) {
    let what = format!("only {expected:?} is left");
    wait_until(&what, async || ids(pool).await == expected).await;
}

/// A subscriber of the events that belong to `queue`.
async fn subscriber(queue: &Queue) -> Subscriber {
    let access = Access { uri: testkit::amqp_uri().parse().unwrap(), authorities: None };
    let mut subscriber = Subscriber::new(&Exchange::on_rabbitmq(access, &queue.name), "test");
    assert!(matches!(timeout(PATIENCE, subscriber.next()).await.unwrap(), Notification::Missed(_)));
    subscriber
}

/// Starts a routine as a separate process. It cleans up every 20 ms unless `more` sets another
/// interval.
fn process(database: &Database, more: &[(&'static str, &str)], arguments: &[&str]) -> Process {
    let mut environment = database.environment();
    let defaults = [("OBJECT_TTL", "1h"), ("ROUTINE_INTERVAL", "20ms")];
    let settings = defaults.iter().chain(more);
    environment.extend(settings.map(|(name, value)| (*name, (*value).to_owned())));
    Process::spawn("routine", &environment, arguments)
}

#[tokio::test]
async fn old_partitions_of_the_history_are_dropped() {
    let database = database().await;
    let pool = database.pool();
    // The first run creates the table.
    process(&database, &[], &["--once"]).wait().await;
    let old = "CREATE TABLE presence_change_20010203 PARTITION OF presence_change
                   FOR VALUES FROM ('2001-02-03Z') TO ('2001-02-04Z');
               INSERT INTO presence_change (object_id, last_seen, is_online)
                   SELECT 1, pg_catalog.now(), true";
    let is_dropped = async || {
        let exists = "SELECT to_regclass('presence_change_20010203') IS NULL";
        sqlx::query_scalar(exists).fetch_one(pool).await.unwrap()
    };
    sqlx::raw_sql(old).execute(pool).await.unwrap();
    process(&database, &[("HISTORY_RETENTION", "0")], &["--once"]).wait().await;
    assert!(!is_dropped().await);
    process(&database, &[], &["--once"]).wait().await;
    assert!(is_dropped().await);
    sqlx::raw_sql(old).execute(pool).await.unwrap();
    let routine = start(database.url(), &[]);
    wait_until("the partition is dropped", is_dropped).await;
    routine.stop().await;
}

#[tokio::test]
async fn critical_tasks_are_supervised_until_the_end() {
    let database = database().await;
    let queue = Queue::new();
    let amqp_uri = format!("--amqp-uri={}", testkit::amqp_uri());
    let queue_name = format!("--queue-name={}", queue.name);
    let routine = start(database.url(), &[&amqp_uri, &queue_name]);
    let tasks = [
        "database monitor (routine)",
        "event publisher (routine: events)",
        "maintenance of the history",
    ];
    let supervisor = routine.supervisor.clone();
    wait_until("the tasks run", async || supervisor.running() == tasks).await;
    routine.stop().await;
    assert!(timeout(Duration::ZERO, supervisor.failure()).await.is_err(), "a clean end failed");
}

#[tokio::test]
async fn stale_rows_are_deleted_and_fresh_ones_kept() {
    let database = database().await;
    // Smaller than the number of stale rows, so that one cleanup takes several batches.
    let routine = start(database.url(), &["--delete-batch-max=7"]);
    cleaned_once(database.pool()).await;
    insert(database.pool(), 31..=33, "50 min").await;
    insert(database.pool(), 1..=30, "61 min").await;
    only_is_left(database.pool(), &[31, 32, 33]).await;
    assert!(routine.health.missing().is_empty());

    insert(database.pool(), 1..=3, "2 h").await;
    only_is_left(database.pool(), &[31, 32, 33]).await;
    routine.stop().await;
}

#[tokio::test]
async fn ttl_and_interval_can_change_at_run_time() {
    let database = database().await;
    insert(database.pool(), 1..=3, "50 min").await;
    let routine = start(database.url(), &[]);
    cleaned_once(database.pool()).await;
    // After this change, the next cleanup is due in an hour. The following change of the interval
    // must not wait for that.
    routine.change(&["--routine-interval=1h"]);
    routine.change(&["--routine-interval=20ms", "--object-ttl=40m"]);
    only_is_left(database.pool(), &[]).await;
    insert(database.pool(), 1..=3, "30 min").await;
    routine.change(&["--routine-interval=20ms", "--object-ttl=20m"]);
    only_is_left(database.pool(), &[]).await;
    routine.stop().await;
}

#[tokio::test]
async fn one_cleanup_deletes_all_stale_rows_in_batches() {
    let database = database().await;
    insert(database.pool(), 1..=1_000, "2 h").await;
    insert(database.pool(), 1_001..=2_000, "1 min").await;
    let routine = start(database.url(), &["--delete-batch-max=7", "--once"]);
    timeout(PATIENCE, routine.run).await.unwrap().unwrap().unwrap();
    assert_eq!(ids(database.pool()).await, (1_001..=2_000).collect::<Vec<_>>());
}

/// Field case 4.4.
#[tokio::test]
async fn rows_dated_in_the_future_become_stale_with_one_warning() {
    let database = database().await;
    insert(database.pool(), 1..=3, "-2 days").await;
    insert(database.pool(), 4..=4, "-200000 years").await;
    let times = [("OBJECT_TTL", "2s"), ("ROUTINE_INTERVAL", "100ms"), ("DELETE_BATCH_MAX", "2")];
    let routine = process(&database, &times, &[]);
    let warning = routine.wait_for_log("dated in the future").await;
    assert!(warning.contains("WARN") && warning.contains("rows=4"), "{warning}");
    only_is_left(database.pool(), &[]).await;
    let warnings = routine.log().iter().filter(|line| line.contains("WARN")).count();
    assert_eq!(warnings, 1, "{:?}", routine.log());
}

/// Field case 4.3.
#[tokio::test]
async fn unusable_table_exits_with_78() {
    let database = Database::new().await;
    let table = "CREATE TABLE object (id text PRIMARY KEY, last_seen timestamptz)";
    sqlx::query(table).execute(database.pool()).await.unwrap();
    let routine = process(&database, &[], &[]);
    assert_eq!(routine.wait().await.code(), Some(78));
    let log = routine.log();
    let reason = |line: &String| line.contains("ERROR") && line.contains("id has the type text");
    assert!(log.iter().any(reason), "{log:?}");
}

#[tokio::test]
async fn deletions_resume_after_a_database_outage() {
    let database = database().await;
    let (proxy, url) = Proxy::before(database.url()).await;
    proxy.cut();
    let fresh: Vec<i64> = (11..=20).collect();
    insert(database.pool(), 11..=20, "1 min").await;
    let routine = start(&url, &[]);
    for ids in [1..=3, 4..=6] {
        wait_for("the database is reported as missing", async || {
            let missing = routine.health.missing();
            missing.iter().find(|(name, reason)| *name == "database" && !reason.is_empty())?;
            Some(())
        })
        .await;
        insert(database.pool(), ids, "2 h").await;
        proxy.restore();
        only_is_left(database.pool(), &fresh).await;
        wait_until("it is ready", async || routine.health.missing().is_empty()).await;
        proxy.cut();
    }
    routine.stop().await;
}

#[tokio::test]
async fn concurrent_routines_count_each_deleted_row_once() {
    const STALE: i64 = 3_000;
    let database = database().await;
    let batch = [("DELETE_BATCH_MAX", "20")];
    let (one, other) = (process(&database, &batch, &[]), process(&database, &batch, &[]));
    for routine in [&one, &other] {
        routine.ready().await;
        cleaned_up_again(routine, "ok").await;
    }
    insert(database.pool(), 1..=STALE, "2 h").await;
    insert(database.pool(), STALE + 1..=STALE + 2, "1 min").await;
    only_is_left(database.pool(), &[STALE + 1, STALE + 2]).await;

    wait_until("every deleted row is counted once", async || {
        let name = "lastseen_deleted_rows_total";
        let counted = one.metric(name).await + other.metric(name).await;
        // `STALE`, as a float.
        assert!(counted <= 3_000.0, "{counted}");
        counted >= 3_000.0
    })
    .await;
    for routine in [one, other] {
        let failed = routine.metric(r#"lastseen_cleanups_total{outcome="failed"}"#).await;
        assert!(failed < 0.5, "{failed} cleanups failed");
        assert!(routine.metric(r#"lastseen_cleanups_total{outcome="ok"}"#).await > 0.5);
    }
}

#[tokio::test]
async fn clock_step_ahead_pauses_deletions_for_one_ttl() {
    let database = database().await;
    let clock = DatabaseClock::install(database.pool()).await;
    let routine = process(&database, &[("OBJECT_TTL", "10s")], &[]);
    routine.ready().await;
    cleaned_up_again(&routine, "ok").await;

    insert(database.pool(), 1..=2, "0 s").await;
    clock.set_ahead(HOUR).await;
    let line = routine.wait_for_log("stepped ahead").await;
    assert!(line.contains("step=3600") || line.contains("step=3599"), "{line}");
    cleaned_up_again(&routine, "skipped").await;
    assert_eq!(ids(database.pool()).await, [1, 2]);

    // Object 2 is seen again and again by the clock that is ahead.
    let seen = "UPDATE object SET last_seen = pg_catalog.now() + interval '1 h' WHERE id = 2";
    wait_until("only object 2 is left", async || {
        sqlx::query(seen).execute(database.pool()).await.unwrap();
        ids(database.pool()).await == [2]
    })
    .await;
    assert!(routine.metric(r#"lastseen_cleanups_total{outcome="skipped"}"#).await > 10.0);
}

#[tokio::test]
async fn clock_step_back_and_its_correction_delete_nothing() {
    let database = database().await;
    let clock = DatabaseClock::install(database.pool()).await;
    let routine = process(&database, &[("OBJECT_TTL", "10m")], &[]);
    routine.ready().await;
    insert(database.pool(), 1..=1, "0 s").await;
    cleaned_up_again(&routine, "ok").await;

    clock.set_behind(HOUR).await;
    // An hour ago is now by the clock that was set back.
    insert(database.pool(), 2..=2, "1 h").await;
    cleaned_up_again(&routine, "ok").await;
    assert_eq!(ids(database.pool()).await, [1, 2]);
    clock.reset().await;
    cleaned_up_again(&routine, "skipped").await;
    assert_eq!(ids(database.pool()).await, [1, 2]);
}

// Field case 3.11
#[tokio::test]
async fn table_mostly_stale_at_the_start_is_cleaned_one_ttl_later() {
    const TTL: Duration = Duration::from_secs(5);
    let database = database().await;
    for arguments in [&[][..], &["--once"][..]] {
        // All rows look stale, as after a step of the clock or after an hour without consumers.
        sqlx::query("TRUNCATE object").execute(database.pool()).await.unwrap();
        insert(database.pool(), 1..=10, "1 h").await;
        let started = Instant::now();
        let routine = process(&database, &[("OBJECT_TTL", "5s")], arguments);
        routine.wait_for_log("most rows look stale").await;
        // Objects that are online are seen again and again.
        wait_until("only objects that were seen again are left", async || {
            see_again(database.pool(), 6..=10).await;
            ids(database.pool()).await == [6, 7, 8, 9, 10]
        })
        .await;
        assert!(started.elapsed() >= TTL, "{:?}", started.elapsed());
    }
}

async fn see_again(pool: &PgPool, ids: std::ops::RangeInclusive<i64>) {
    let sql = "UPDATE object SET last_seen = now() WHERE id BETWEEN $1 AND $2";
    sqlx::query(sql).bind(ids.start()).bind(ids.end()).execute(pool).await.unwrap();
}

#[tokio::test]
async fn table_stale_after_an_outage_is_cleaned_one_ttl_later() {
    let database = database().await;
    let (proxy, url) = Proxy::before(database.url()).await;
    let routine = start(&url, &["--object-ttl=5s"]);
    cleaned_once(database.pool()).await;
    proxy.cut();
    wait_until("the database is reported as missing", async || {
        !routine.health.missing().is_empty()
    })
    .await;
    insert(database.pool(), 1..=10, "1 h").await;
    let restored_at = Instant::now();
    proxy.restore();
    only_is_left(database.pool(), &[]).await;
    assert!(restored_at.elapsed() >= Duration::from_secs(5), "{:?}", restored_at.elapsed());
    routine.stop().await;
}

#[tokio::test]
async fn undeletable_rows_do_not_block_the_others() {
    let database = database().await;
    let routine = process(&database, &[], &[]);
    routine.ready().await;
    cleaned_up_again(&routine, "ok").await;
    // Another table refers to row 3, and the trigger of row 5 waits for a lock.
    let obstacles = "
        CREATE TABLE other (id bigint REFERENCES object);
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock(5); RETURN OLD; END $$;
        CREATE TRIGGER wait BEFORE DELETE ON object FOR EACH ROW WHEN (OLD.id = 5)
        EXECUTE FUNCTION wait()";
    sqlx::raw_sql(obstacles).execute(database.pool()).await.unwrap();
    let mut other = database.pool().begin().await.unwrap();
    let stale = "INSERT INTO object SELECT id, pg_catalog.now() - interval '2 h'
                 FROM generate_series(1, 20) AS id";
    let lock = sqlx::query("SELECT pg_advisory_xact_lock(5)").execute(&mut *other).await;
    lock.unwrap();
    let mut rows = database.pool().begin().await.unwrap();
    sqlx::query(stale).execute(&mut *rows).await.unwrap();
    sqlx::query("INSERT INTO other VALUES (3)").execute(&mut *rows).await.unwrap();
    rows.commit().await.unwrap();

    only_is_left(database.pool(), &[3, 5]).await;
    routine.wait_for_metric("lastseen_stale_rows_not_deleted", 2.0).await;
    other.rollback().await.unwrap();
    sqlx::query("DELETE FROM other").execute(database.pool()).await.unwrap();
    only_is_left(database.pool(), &[]).await;
}

// Field case 4.5
#[tokio::test]
async fn a_deletion_whose_outcome_is_lost_leaves_a_gap() {
    let (queue, database) = (Queue::new(), database().await);
    let (proxy, url) = Proxy::before(database.url()).await;
    let mut subscriber = subscriber(&queue).await;
    let uri = format!("--amqp-uri={}", testkit::amqp_uri());
    let routine = start(&url, &[&uri, &format!("--queue-name={}", queue.name)]);
    wait_until("the routine can announce", async || routine.health.missing_optional().is_empty())
        .await;
    cleaned_once(database.pool()).await;
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;
                CREATE TRIGGER slow AFTER DELETE ON object FOR EACH ROW EXECUTE FUNCTION slow()";
    sqlx::raw_sql(slow).execute(database.pool()).await.unwrap();
    insert(database.pool(), 1..=1, "2 h").await;
    wait_until("the deletion is running", async || {
        let sleeping = "SELECT count(*) FROM pg_stat_activity
                        WHERE datname = current_database() AND wait_event = 'PgSleep'";
        let sleeping = sqlx::query_scalar(sleeping).fetch_one(database.pool());
        let sleeping: i64 = sleeping.await.unwrap();
        sleeping > 0
    })
    .await;
    // The database commits although its client is disconnected.
    proxy.cut();
    only_is_left(database.pool(), &[]).await;
    proxy.restore();
    loop {
        match timeout(PATIENCE, subscriber.next()).await.unwrap() {
            Notification::Missed(why) => break assert!(why.contains("are missing"), "{why}"),
            // The negative ids are those of `cleaned_once`.
            Notification::Committed(_, objects) => assert!(objects[0].id < 0, "{objects:?}"),
            other @ Notification::GivenUp(_) => panic!("{other:?}"),
        }
    }
    routine.stop().await;
}

/// Waits for two more cleanups with this outcome, because the first may have begun before the call.
async fn cleaned_up_again(routine: &Process, outcome: &str) {
    let name = format!("lastseen_cleanups_total{{outcome=\"{outcome}\"}}");
    let before = routine.metric(&name).await;
    routine.wait_for_metric(&name, before + 2.0).await;
}

#[tokio::test]
async fn once_cleans_up_and_exits_0() {
    let database = database().await;
    insert(database.pool(), 1..=5, "2 h").await;
    insert(database.pool(), 6..=10, "1 min").await;
    let routine = process(&database, &[], &["--once"]);
    let ended = routine.wait().await;
    assert_eq!(ended.code(), Some(0), "{ended}");
    assert_eq!(ids(database.pool()).await, [6, 7, 8, 9, 10]);
}

#[tokio::test]
async fn deletions_are_announced_also_with_once() {
    let (queue, database) = (Queue::new(), database().await);
    let mut subscriber = subscriber(&queue).await;
    let uri = testkit::amqp_uri();
    let settings = [("AMQP_URI", uri.as_str()), ("QUEUE_NAME", &queue.name)];
    insert(database.pool(), 11..=20, "1 min").await;
    for (id, arguments) in [(1, &["--once"][..]), (2, &[])] {
        insert(database.pool(), id..=id, "2 h").await;
        let _routine = process(&database, &settings, arguments);
        let (kind, gone) = loop {
            let notification = timeout(PATIENCE, subscriber.next()).await.unwrap();
            // The second routine may delete the row before it has connected to the broker.
            let Notification::Committed(kind, gone) = notification else {
                insert(database.pool(), id..=id, "2 h").await;
                continue;
            };
            break (kind, gone);
        };
        assert_eq!((kind, gone[0].id), (Kind::Gone, id));
        let age = gone[0].last_seen.elapsed().unwrap();
        assert!(age > Duration::from_mins(119), "{age:?}");
    }
}

#[tokio::test]
async fn cleanup_works_without_the_broker() {
    let database = database().await;
    insert(database.pool(), 1..=1, "2 h").await;
    insert(database.pool(), 2..=3, "1 min").await;
    let nowhere = format!("amqp://127.0.0.1:{}", testkit::free_port());
    let routine = process(&database, &[("AMQP_URI", &nowhere)], &[]);
    only_is_left(database.pool(), &[2, 3]).await;
    let (status, body) = routine.get("/readyz").await;
    assert!(status == 200 && body.contains("without events: cannot reach"), "{status} {body}");
    routine.stop().await;
}

#[tokio::test]
async fn sigterm_exits_0() {
    let database = database().await;
    let routine = process(&database, &[], &[]);
    routine.ready().await;
    routine.stop().await;
    assert!(routine.log().last().unwrap().contains("stopped"), "{:?}", routine.log());
}

#[tokio::test]
async fn sigterm_without_a_database_exits_0() {
    let database = database().await;
    let nowhere = testkit::free_port().to_string();
    let routine = process(&database, &[("POSTGRES_PORT", &nowhere)], &[]);
    routine.wait_for_log("no database").await;
    let (status, body) = routine.get("/readyz").await;
    assert_eq!(status, 503);
    assert!(body.contains("database: cannot connect"), "{body}");
    routine.stop().await;
}

#[tokio::test]
async fn bad_setting_exits_with_78_and_names_allowed_values() {
    let bad = [
        ("ROUTINE_INTERVAL", "soon", "a duration from 10ms to 1d"),
        ("OBJECT_TTL", "0s", "a duration from 1s to 365d"),
        ("OBJECT_TTL", "5M", "a duration from 1s to 365d"),
        ("DELETE_BATCH_MAX", "0", "a whole number from 1 to 100000"),
    ];
    for (name, value, allowed) in bad {
        let routine = Process::spawn("routine", &[(name, value.to_owned())], &[]);
        let ended = routine.wait().await;
        assert_eq!(ended.code(), Some(78), "{ended}");
        let log = routine.log();
        let [line] = log.as_slice() else { panic!("{log:?}") };
        assert!(line.contains(&format!("{name}={value}: expected {allowed}")), "{line}");
    }
}
