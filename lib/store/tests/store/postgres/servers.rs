//! Tests with several servers of one database.

use std::time::Duration;

use sqlx::PgPool;
use store::{Failure, Objects, Store, StoreError};
use testkit::{
    Database, LogCapture, PgBouncer, PostgresCluster, Proxy, free_port, wait_for, wait_until,
};
use tokio::time::{Instant, timeout};
use tracing::Level;

use super::{config, ids, start, wait_until_recorded};
use crate::{DEADLINE, HOUR, ready, seen, unready};

/// The maximum time from a promotion to the first row in the new primary.
const FAILOVER: Duration = Duration::from_secs(5);
/// The application name of the stores.
const WRITER: &str = "test";
/// The application name of readers.
const READER: &str = "objects";

/// One URL for the servers of all these URLs, which name the same database.
fn url_of(urls: &[&str]) -> String {
    let after_user = urls.iter().map(|url| url.split_once('@').unwrap().1);
    let (hosts, databases): (Vec<_>, Vec<_>) =
        after_user.map(|rest| rest.split_once('/').unwrap()).unzip();
    format!("postgres://postgres@{}/{}", hosts.join(","), databases.last().unwrap())
}

/// The URL of a server that refuses all connections.
fn nowhere() -> String {
    format!("postgres://postgres@127.0.0.1:{}/postgres", free_port())
}

/// The number of sessions on the server that an application has.
async fn sessions(pool: &PgPool, application: &str) -> i64 {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1";
    sqlx::query_scalar(sql).bind(application).fetch_one(pool).await.unwrap()
}

async fn wait_for_sessions(pool: &PgPool, application: &str, expected: i64) {
    let count = async || sessions(pool, application).await == expected;
    wait_until(&format!("{application} has {expected} sessions"), count).await;
}

#[tokio::test]
async fn writer_leaves_a_demoted_primary_for_the_promoted_standby() {
    let (primary, standby) = primary_and_standby().await;
    let store = start(&url_of(&[primary.url(), standby.url()]), 8);
    ready(&store).await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    // The monitor's connection and an idle one.
    assert_eq!(sessions(primary.pool(), WRITER).await, 2);

    primary.demote().await;
    unready(&store, "read-only").await;
    wait_for_sessions(primary.pool(), WRITER, 0).await;
    let reason = unready(&store, "no read-write server").await;
    let each = [
        format!("127.0.0.1:{} is read-only", primary.port()),
        format!("127.0.0.1:{} is a read-only standby", standby.port()),
    ];
    assert!(each.iter().all(|part| reason.contains(part)), "{reason}");

    standby.promote().await;
    let promoted = Instant::now();
    wait_until_recorded(&store, seen(2, HOUR)).await;
    assert!(promoted.elapsed() < FAILOVER, "took {:?}", promoted.elapsed());
    ready(&store).await;
    assert_eq!(ids(standby.pool()).await, [1, 2]);
    assert_eq!(ids(primary.pool()).await, [1]);
    // The former primary, which comes first in the settings, does not attract a writer again.
    primary.configure("ALTER SYSTEM RESET default_transaction_read_only").await;
    store.record_seen(&[seen(3, HOUR)]).await.unwrap();
    assert_eq!(sessions(primary.pool(), WRITER).await, 0);
}

#[tokio::test]
async fn running_statement_ends_when_its_server_becomes_read_only() {
    let (primary, standby) = primary_and_standby().await;
    let (switch, url) = Proxy::before(primary.url()).await;
    let store = start(&url, 2);
    hold_up_commit(&store, &primary, &standby, async || {
        primary.demote().await;
        switch.switch_to(format!("127.0.0.1:{}", standby.port()));
    })
    .await;
}

#[tokio::test]
async fn running_statement_ends_when_another_server_is_found() {
    let (primary, standby) = primary_and_standby().await;
    let (proxy, url) = Proxy::before(primary.url()).await;
    let store = start(&url_of(&[&url, standby.url()]), 2);
    hold_up_commit(&store, &primary, &standby, async || proxy.silence()).await;
}

async fn primary_and_standby() -> (PostgresCluster, PostgresCluster) {
    let primary = PostgresCluster::start().await;
    let standby = primary.start_standby().await;
    (primary, standby)
}

/// Promotes the standby, for which a commit on the primary then waits forever, and makes the store
/// leave the primary. Checks that the statement ends long before its deadline, and that the row
/// gets into the new primary.
async fn hold_up_commit(
    store: &Store,
    primary: &PostgresCluster,
    standby: &PostgresCluster,
    leave_primary: impl AsyncFnOnce(),
) {
    ready(store).await;
    standby.promote().await;
    let leave = async {
        let waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
        wait_until("the commit waits for the standby", async || {
            let waiting = sqlx::query_scalar(waiting).fetch_one(primary.pool()).await;
            waiting.is_ok_and(|waiting: i64| waiting > 0)
        })
        .await;
        leave_primary().await;
    };
    let sightings = [seen(1, HOUR)];
    let (recorded, ()) = tokio::join!(timeout(DEADLINE, store.record_seen(&sightings)), leave);
    let error = recorded.unwrap().unwrap_err();
    // After the statement's deadline, it would be `Timeout`.
    assert!(matches!(error, StoreError::Abandoned), "{error:?}");
    assert!(error.may_be_committed());
    assert_eq!(error.failure(), Failure::Connection);
    wait_until_recorded(store, seen(1, HOUR)).await;
    assert_eq!(ids(standby.pool()).await, [1]);
}

#[tokio::test]
async fn connection_in_use_is_closed_after_the_monitor_has_lost_its_own() {
    let database = Database::new().await;
    let store = start(database.url(), 1);
    ready(&store).await;
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql
                AS $$ BEGIN PERFORM pg_sleep(3); RETURN NEW; END $$;
                CREATE TRIGGER slow BEFORE INSERT ON object EXECUTE FUNCTION slow()";
    sqlx::raw_sql(slow).execute(database.pool()).await.unwrap();
    let lose_monitor = async {
        let slow = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
        let pid: i32 = wait_for("the statement is slow", async || {
            sqlx::query_scalar(slow).fetch_optional(database.pool()).await.unwrap()
        })
        .await;
        let terminate = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
                         WHERE datname = current_database() AND application_name = $1 AND pid <> $2";
        let terminate = sqlx::query_scalar(terminate).bind(WRITER).bind(pid);
        let terminated: i64 = terminate.fetch_one(database.pool()).await.unwrap();
        assert_eq!(terminated, 1);
        unready(&store, "").await;
        pid
    };
    let sightings = [seen(1, HOUR)];
    let (recorded, pid) = tokio::join!(store.record_seen(&sightings), lose_monitor);
    recorded.unwrap();
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE pid = $1";
    wait_until("the connection is closed", async || {
        let open = sqlx::query_scalar(sql).bind(pid).fetch_one(database.pool());
        let open: i64 = open.await.unwrap();
        open == 0
    })
    .await;
}

#[tokio::test]
async fn writer_behind_poolers_follows_a_failover() {
    let (primary, standby) = primary_and_standby().await;
    let to_primary = PgBouncer::start(primary.url(), "transaction", 2).await;
    let to_standby = PgBouncer::start(standby.url(), "transaction", 2).await;
    let store = start(&url_of(&[to_primary.url(), to_standby.url()]), 4);
    ready(&store).await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    primary.demote().await;
    unready(&store, "read-only").await;
    standby.promote().await;
    let promoted = Instant::now();
    wait_until_recorded(&store, seen(2, HOUR)).await;
    assert!(promoted.elapsed() < FAILOVER, "took {:?}", promoted.elapsed());
    assert_eq!(ids(standby.pool()).await, [1, 2]);
}

#[tokio::test]
async fn silent_or_refusing_servers_do_not_hold_up_a_writer() {
    let database = Database::new().await;
    let (proxy, silent) = Proxy::before(database.url()).await;
    proxy.silence();
    let started = Instant::now();
    // One after the other, both silent ones would take longer than the limit.
    let store = start(&url_of(&[&nowhere(), &silent, &silent, database.url()]), 1);
    ready(&store).await;
    assert!(started.elapsed() < FAILOVER, "took {:?}", started.elapsed());
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    assert_eq!(ids(database.pool()).await, [1]);
}

#[tokio::test]
async fn unusable_server_is_logged_once_while_another_one_is_connected() {
    let log = LogCapture::start(Level::WARN, "store");
    let (primary, standby) = primary_and_standby().await;
    let (proxy, silent) = Proxy::before(primary.url()).await;
    proxy.silence();
    let refusing = nowhere();
    let urls = [&refusing, &silent, standby.url(), primary.url()];
    let from_url = config(&format!("{}?target_session_attrs=primary", url_of(&urls)));
    let ports = urls.map(|url| url.rsplit(':').next().unwrap().split('/').next().unwrap());
    let from_settings: store::Config = testkit::parse([
        "--postgres-host=127.0.0.1,127.0.0.1,127.0.0.1,127.0.0.1".to_owned(),
        format!("--postgres-port={}", ports.join(",")),
        "--postgres-target-session-attrs=primary".to_owned(),
    ]);
    for (times, config) in [(1, from_url), (2, from_settings)] {
        Objects::open(&config).await.unwrap();
        Objects::open(&config).await.unwrap();
        // The standby is unsuitable, but not broken.
        for (port, reason) in [(ports[0], "refused"), (ports[1], "no answer within 1s")] {
            let lines = log.lines_with(&format!("server=\"127.0.0.1:{port}\""));
            assert_eq!(lines.len(), times, "{lines:?}");
            assert!(lines.iter().all(|line| line.contains(reason)), "{lines:?}");
        }
        assert_eq!(log.lines_with("").len(), 2 * times, "{:?}", log.lines_with(""));
    }
}

#[tokio::test]
async fn error_names_each_server_in_the_order_of_the_settings() {
    let (one, other) = (nowhere(), nowhere());
    let url = url_of(&[&one, &other, "postgres://postgres@[::1]:1/postgres"]);
    let Err(error) = Objects::open(&config(&url)).await else { panic!("connected to nothing") };
    assert!(matches!(error, StoreError::Connect(_)), "{error:?}");
    let error = error.to_string();
    let at = |url: &str| error.find(url.split(['@', '/']).nth(3).unwrap()).unwrap();
    assert!(error.starts_with("cannot connect: no server: 127.0.0.1:"), "{error}");
    assert!(at(&one) < at(&other), "{error}");
    assert!(error.contains("refused") && error.contains("; [::1]:1: "), "{error}");
    assert!(!error.contains("lookup"), "{error}");
}

#[tokio::test]
async fn reader_uses_the_server_that_the_settings_want() {
    let (primary, standby) = primary_and_standby().await;
    let store = start(primary.url(), 1);
    ready(&store).await;
    // A commit waits until the standby has applied it, so that no reader misses a row.
    primary.configure("ALTER SYSTEM SET synchronous_commit = remote_apply").await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    let url = url_of(&[&nowhere(), primary.url(), standby.url()]);
    let open = async |attrs: &str| {
        Objects::open(&config(&format!("{url}?target_session_attrs={attrs}"))).await
    };
    for (attrs, expected) in [
        ("any", &primary),
        ("primary", &primary),
        ("read-write", &primary),
        ("read-only", &standby),
        ("standby", &standby),
        ("prefer-standby", &standby),
    ] {
        let mut objects = open(attrs).await.unwrap();
        assert_eq!(objects.count().await.unwrap(), 1, "{attrs}");
        assert_eq!(sessions(expected.pool(), READER).await, 1, "{attrs}");
        drop(objects);
        wait_for_sessions(expected.pool(), READER, 0).await;
    }

    standby.promote().await;
    let Err(error) = open("standby").await else { panic!("there is no standby") };
    assert!(error.to_string().contains("no standby server: "), "{error}");
    assert!(error.to_string().contains(" is read-write; "), "{error}");
    let mut objects = open("prefer-standby").await.unwrap();
    assert_eq!(objects.count().await.unwrap(), 1);
    let single = config(&format!("{}?target_session_attrs=standby", primary.url()));
    let Err(error) = Objects::open(&single).await else { panic!("it is no standby") };
    assert_eq!(error.to_string(), "the database is read-write");
}

#[tokio::test]
async fn writer_ignores_the_attributes_for_readers() {
    let database = Database::new().await;
    let store = start(&format!("{}?target_session_attrs=standby", database.url()), 1);
    ready(&store).await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
}
