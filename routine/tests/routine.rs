//! The cleanup against a real Postgres, in the test's process and as a process of its own.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

use std::time::{Duration, Instant};

use amqp::Access;
use clap::Parser as _;
use events::{Exchange, Kind, Notification, Subscriber};
use service::{CancellationToken, Health, ReloadHandle, Reloadable};
use sqlx::PgPool;
use testbed::{Database, DatabaseClock, Process, Proxy, Queue, eventually};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use url::Url;

/// Far longer than any step takes, because a machine that runs all tests at once is slow.
const DEADLINE: Duration = Duration::from_secs(30);

#[derive(clap::Parser)]
#[command(args_override_self = true)]
struct Cli {
    #[command(flatten)]
    config: routine::Config,
}

/// A routine in the test's process, which cleans up continuously.
struct Routine {
    health: Health,
    shutdown: CancellationToken,
    settings: ReloadHandle<routine::Config>,
    arguments: Vec<String>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Routine {
    fn start(database_url: &str, arguments: &[&str]) -> Self {
        let url = format!("--database-url={database_url}");
        let defaults = ["routine", &url, "--object-ttl=1h", "--routine-interval=20ms"];
        let arguments: Vec<String> =
            defaults.iter().chain(arguments).map(|&argument| argument.to_owned()).collect();
        let (settings, config) = Reloadable::with_handle(Cli::parse_from(&arguments).config);
        let (health, shutdown) = (Health::default(), CancellationToken::new());
        let task = tokio::spawn(routine::run(config, health.clone(), shutdown.clone()));
        Self { health, shutdown, settings, arguments, task }
    }

    /// Changes its settings by flags such as `--object-ttl=1s`.
    fn change(&self, further: &[&str]) {
        let further = further.iter().map(|&argument| argument.to_owned());
        let arguments = self.arguments.iter().cloned().chain(further);
        self.settings.set(Cli::parse_from(arguments).config);
    }

    /// Waits for the first cleanup. Rows that look stale later then cause no pause.
    async fn cleaned_once(&self, pool: &PgPool) {
        insert(pool, -1..=-1, "1 s").await;
        insert(pool, -2..=-2, "2 h").await;
        eventually("the first cleanup", DEADLINE, async || {
            (!ids(pool).await.contains(&-2)).then_some(())
        })
        .await;
        sqlx::query("DELETE FROM object WHERE id = -1").execute(pool).await.unwrap();
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.shutdown.cancel();
        timeout(DEADLINE, self.task).await.unwrap().unwrap()
    }
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
    eventually(&what, DEADLINE, async || (ids(pool).await == expected).then_some(())).await;
}

/// A routine in a process of its own, which cleans up continuously unless `more` changes that.
fn process(database: &Database, more: &[(&'static str, &str)], arguments: &[&str]) -> Process {
    let mut environment = database.environment();
    let defaults = [("OBJECT_TTL", "1h"), ("ROUTINE_INTERVAL", "20ms")];
    let settings = defaults.iter().chain(more);
    environment.extend(settings.map(|(name, value)| (*name, (*value).to_owned())));
    Process::spawn("routine", &environment, arguments)
}

#[tokio::test]
async fn stale_rows_are_deleted_and_fresh_ones_kept() {
    let database = database().await;
    // Smaller than the number of stale rows, so that one cleanup takes several batches.
    let routine = Routine::start(database.url(), &["--delete-batch-max=7"]);
    routine.cleaned_once(database.pool()).await;
    insert(database.pool(), 31..=33, "50 min").await;
    insert(database.pool(), 1..=30, "61 min").await;
    only_is_left(database.pool(), &[31, 32, 33]).await;
    assert!(routine.health.missing().is_empty());

    insert(database.pool(), 1..=3, "2 h").await;
    only_is_left(database.pool(), &[31, 32, 33]).await;
    routine.stop().await.unwrap();
}

#[tokio::test]
async fn ttl_and_interval_can_change_at_run_time() {
    let database = database().await;
    insert(database.pool(), 1..=3, "50 min").await;
    let routine = Routine::start(database.url(), &[]);
    routine.cleaned_once(database.pool()).await;
    // The next cleanup is now due in an hour.
    routine.change(&["--routine-interval=1h"]);
    routine.change(&["--routine-interval=20ms", "--object-ttl=40m"]);
    only_is_left(database.pool(), &[]).await;
    insert(database.pool(), 1..=3, "30 min").await;
    routine.change(&["--routine-interval=20ms", "--object-ttl=20m"]);
    only_is_left(database.pool(), &[]).await;
    routine.stop().await.unwrap();
}

#[tokio::test]
async fn one_cleanup_deletes_all_stale_rows_in_batches() {
    let database = database().await;
    insert(database.pool(), 1..=1_000, "2 h").await;
    insert(database.pool(), 1_001..=2_000, "1 min").await;
    let routine = Routine::start(database.url(), &["--delete-batch-max=7", "--once"]);
    timeout(DEADLINE, routine.task).await.unwrap().unwrap().unwrap();
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
    let (proxy, url) = proxied(&database).await;
    proxy.cut();
    let fresh: Vec<i64> = (11..=20).collect();
    insert(database.pool(), 11..=20, "1 min").await;
    let routine = Routine::start(&url, &[]);
    for ids in [1..=3, 4..=6] {
        eventually("the database is reported as missing", DEADLINE, async || {
            let missing = routine.health.missing();
            missing.iter().find(|(name, reason)| *name == "database" && !reason.is_empty())?;
            Some(())
        })
        .await;
        insert(database.pool(), ids, "2 h").await;
        proxy.restore();
        only_is_left(database.pool(), &fresh).await;
        eventually("it is ready", DEADLINE, async || {
            routine.health.missing().is_empty().then_some(())
        })
        .await;
        proxy.cut();
    }
    routine.stop().await.unwrap();
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

    eventually("every deleted row is counted once", DEADLINE, async || {
        let name = "lastseen_deleted_rows_total";
        let counted = one.metric(name).await + other.metric(name).await;
        assert!(counted <= 3_000.0, "{counted}");
        (counted >= 3_000.0).then_some(())
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
    const HOUR: Duration = Duration::from_hours(1);
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

    // Object 2 is seen again and stays fresh.
    let seen = "UPDATE object SET last_seen = pg_catalog.now() + interval '2 h' WHERE id = 2";
    sqlx::query(seen).execute(database.pool()).await.unwrap();
    only_is_left(database.pool(), &[2]).await;
    assert!(routine.metric(r#"lastseen_cleanups_total{outcome="skipped"}"#).await > 10.0);
}

#[tokio::test]
async fn clock_step_back_and_its_correction_delete_nothing() {
    const HOUR: Duration = Duration::from_hours(1);
    let database = database().await;
    let clock = DatabaseClock::install(database.pool()).await;
    let routine = process(&database, &[("OBJECT_TTL", "10m")], &[]);
    routine.ready().await;
    insert(database.pool(), 1..=1, "0 s").await;
    cleaned_up_again(&routine, "ok").await;

    clock.set_behind(HOUR).await;
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
        eventually("only objects that were seen again are left", DEADLINE, async || {
            see_again(database.pool(), 6..=10).await;
            (ids(database.pool()).await == [6, 7, 8, 9, 10]).then_some(())
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
    let (proxy, url) = proxied(&database).await;
    let routine = Routine::start(&url, &["--object-ttl=5s"]);
    routine.cleaned_once(database.pool()).await;
    proxy.cut();
    eventually("the database is reported as missing", DEADLINE, async || {
        (!routine.health.missing().is_empty()).then_some(())
    })
    .await;
    insert(database.pool(), 1..=10, "1 h").await;
    let back = Instant::now();
    proxy.restore();
    only_is_left(database.pool(), &[]).await;
    assert!(back.elapsed() >= Duration::from_secs(5), "{:?}", back.elapsed());
    routine.stop().await.unwrap();
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
    let both = "WITH rows AS (
                    INSERT INTO object SELECT id, pg_catalog.now() - interval '2 h'
                    FROM generate_series(1, 20) AS id RETURNING id)
                SELECT FROM rows";
    let lock = sqlx::query("SELECT pg_advisory_xact_lock(5)").execute(&mut *other).await;
    lock.unwrap();
    let mut rows = database.pool().begin().await.unwrap();
    sqlx::query(both).execute(&mut *rows).await.unwrap();
    sqlx::query("INSERT INTO other VALUES (3)").execute(&mut *rows).await.unwrap();
    rows.commit().await.unwrap();

    only_is_left(database.pool(), &[3, 5]).await;
    eventually("the rows that are left are counted", DEADLINE, async || {
        (routine.metric("lastseen_stale_rows_not_deleted").await > 1.5).then_some(())
    })
    .await;
    other.rollback().await.unwrap();
    sqlx::query("DELETE FROM other").execute(database.pool()).await.unwrap();
    only_is_left(database.pool(), &[]).await;
}

// Field case 4.5
#[tokio::test]
async fn a_deletion_whose_outcome_is_lost_leaves_a_gap() {
    let (queue, database) = (Queue::new(), database().await);
    let (proxy, url) = proxied(&database).await;
    let access = Access { uri: testbed::amqp_uri().parse().unwrap(), authorities: None };
    let mut subscriber = Subscriber::new(&Exchange::on_rabbitmq(access, &queue.name), "test");
    assert!(matches!(timeout(DEADLINE, subscriber.next()).await.unwrap(), Notification::Missed(_)));
    let uri = format!("--amqp-uri={}", testbed::amqp_uri());
    let routine = Routine::start(&url, &[&uri, &format!("--queue-name={}", queue.name)]);
    eventually("the routine can announce", DEADLINE, async || {
        routine.health.missing_optional().is_empty().then_some(())
    })
    .await;
    routine.cleaned_once(database.pool()).await;
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;
                CREATE TRIGGER slow AFTER DELETE ON object FOR EACH ROW EXECUTE FUNCTION slow()";
    sqlx::raw_sql(slow).execute(database.pool()).await.unwrap();
    insert(database.pool(), 1..=1, "2 h").await;
    eventually("the deletion is running", DEADLINE, async || {
        let sleeping = "SELECT count(*) FROM pg_stat_activity
                        WHERE datname = current_database() AND wait_event = 'PgSleep'";
        let sleeping = sqlx::query_scalar(sleeping).fetch_one(database.pool());
        let sleeping: i64 = sleeping.await.unwrap();
        (sleeping > 0).then_some(())
    })
    .await;
    // The database commits although its client is disconnected.
    proxy.cut();
    only_is_left(database.pool(), &[]).await;
    proxy.restore();
    loop {
        match timeout(DEADLINE, subscriber.next()).await.unwrap() {
            Notification::Missed(why) => break assert!(why.contains("are missing"), "{why}"),
            Notification::Committed(_, objects) => assert!(objects[0].id < 0, "{objects:?}"),
        }
    }
    routine.stop().await.unwrap();
}

/// A proxy in front of the database, and the database's URL through the proxy.
async fn proxied(database: &Database) -> (Proxy, String) {
    let mut url = Url::parse(database.url()).unwrap();
    let server = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5432));
    let proxy = Proxy::start(server).await;
    url.set_host(Some(&proxy.addr().ip().to_string())).unwrap();
    url.set_port(Some(proxy.addr().port())).unwrap();
    (proxy, url.to_string())
}

/// Waits for two more cleanups with this outcome. The second one began after this call.
async fn cleaned_up_again(routine: &Process, outcome: &str) {
    let name = format!("lastseen_cleanups_total{{outcome=\"{outcome}\"}}");
    let before = routine.metric(&name).await;
    eventually("there were more cleanups", DEADLINE, async || {
        (routine.metric(&name).await >= before + 2.0).then_some(())
    })
    .await;
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
    let access = Access { uri: testbed::amqp_uri().parse().unwrap(), authorities: None };
    let mut subscriber = Subscriber::new(&Exchange::on_rabbitmq(access, &queue.name), "test");
    assert!(matches!(timeout(DEADLINE, subscriber.next()).await.unwrap(), Notification::Missed(_)));
    let uri = testbed::amqp_uri();
    let settings = [("AMQP_URI", uri.as_str()), ("QUEUE_NAME", &queue.name)];
    insert(database.pool(), 11..=20, "1 min").await;
    for (id, arguments) in [(1, &["--once"][..]), (2, &[])] {
        insert(database.pool(), id..=id, "2 h").await;
        let _routine = process(&database, &settings, arguments);
        let (kind, gone) = loop {
            let notice = timeout(DEADLINE, subscriber.next()).await.unwrap();
            // The second routine may delete the row before it has connected to the broker.
            let Notification::Committed(kind, gone) = notice else {
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
    let nowhere = format!("amqp://127.0.0.1:{}", testbed::free_port());
    let routine = process(&database, &[("AMQP_URI", &nowhere)], &[]);
    only_is_left(database.pool(), &[2, 3]).await;
    let (status, body) = routine.get("/readyz").await;
    assert!(status == 200 && body.contains("without events: cannot reach"), "{status} {body}");
    routine.terminate();
    assert_eq!(routine.wait().await.code(), Some(0));
}

#[tokio::test]
async fn sigterm_exits_0() {
    let database = database().await;
    let routine = process(&database, &[], &[]);
    routine.ready().await;
    routine.terminate();
    let ended = routine.wait().await;
    assert_eq!(ended.code(), Some(0), "{ended}");
    assert!(routine.log().last().unwrap().contains("stopped"), "{:?}", routine.log());
}

#[tokio::test]
async fn sigterm_without_a_database_exits_0() {
    let database = database().await;
    let nowhere = testbed::free_port().to_string();
    let routine = process(&database, &[("POSTGRES_PORT", &nowhere)], &[]);
    routine.wait_for_log("no database").await;
    let (status, body) = routine.get("/readyz").await;
    assert_eq!(status, 503);
    assert!(body.contains("database: cannot connect"), "{body}");
    routine.terminate();
    let ended = routine.wait().await;
    assert_eq!(ended.code(), Some(0), "{ended}");
}

#[tokio::test]
async fn bad_setting_exits_with_78_and_names_allowed_values() {
    let bad = [
        ("ROUTINE_INTERVAL", "soon", "a duration from 10ms to 1d"),
        ("OBJECT_TTL", "0s", "a duration from 1s to 365d"),
        ("OBJECT_TTL", "5M", "a duration from 1s to 365d"),
        ("DELETE_BATCH_MAX", "0", "a number from 1 to 100000"),
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
