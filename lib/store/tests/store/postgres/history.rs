//! The history in Postgres: partitions, and transactions of others.

use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use store::{History, Presence, Store};
use testkit::{GO_TABLE, PostgresCluster, wait_until};

use super::{config, open, start};
use crate::{HOUR, delete_stale, ready, seen};

async fn run(pool: &PgPool, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(pool).await.unwrap();
}

async fn partitions(pool: &PgPool) -> Vec<String> {
    let sql = "SELECT relname FROM pg_inherits JOIN pg_class ON oid = inhrelid
               WHERE inhparent = 'presence_change'::regclass ORDER BY relname";
    sqlx::query_scalar(sql).fetch_all(pool).await.unwrap()
}

/// The number of changes that can be read.
async fn readable(history: &History) -> usize {
    history.changes_after(0, 1_000).await.unwrap().changes.len()
}

#[tokio::test]
async fn no_change_is_read_before_an_earlier_one_is_committed() {
    let (database, store) = open().await;
    expect_changes_in_order(&store, database.url(), database.url()).await;
}

#[tokio::test]
async fn standby_returns_no_change_before_an_earlier_one() {
    let primary = PostgresCluster::start().await;
    let standby = primary.start_standby().await;
    let store = start(primary.url(), 2);
    ready(&store).await;
    expect_changes_in_order(&store, primary.url(), standby.url()).await;
}

/// A transaction takes its position early, and commits late.
async fn expect_changes_in_order(store: &Store, primary: &str, reader: &str) {
    let history = History::new(&config(reader));
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    wait_until("the first change is readable", async || readable(&history).await == 1).await;
    let first = history.settled().await.unwrap();
    assert_eq!(first, history.extent().await.unwrap().unwrap().last.position);

    let mut other = PgConnection::connect(primary).await.unwrap();
    let mut slow = other.begin().await.unwrap();
    let insert =
        "INSERT INTO presence_change (object_id, last_seen, is_online) VALUES (2, now(), true)";
    sqlx::query(insert).execute(&mut *slow).await.unwrap();
    store.record_seen(&[seen(3, HOUR)]).await.unwrap();
    let newest = async || history.extent().await.unwrap().unwrap().last.id;
    wait_until("the later change is visible", async || newest().await == 3).await;
    for _ in 0..3 {
        assert_eq!(readable(&history).await, 1);
        assert_eq!(history.settled().await.unwrap(), first);
    }
    slow.commit().await.unwrap();
    wait_until("all changes are readable", async || readable(&history).await == 3).await;
    let changes = history.changes_after(0, 10).await.unwrap().changes;
    assert_eq!(changes.iter().map(|change| change.id).collect::<Vec<_>>(), [1, 2, 3]);
    assert_eq!(history.settled().await.unwrap(), changes[2].position);
}

#[tokio::test]
async fn partitions_are_created_in_advance_and_dropped_when_old() {
    let (database, store) = open().await;
    let pool = database.pool();
    let today = "SELECT to_char(now() AT TIME ZONE 'UTC', '\"presence_change_\"YYYYMMDD')";
    let today: String = sqlx::query_scalar(today).fetch_one(pool).await.unwrap();
    let created = partitions(pool).await;
    assert_eq!(created.len(), 9, "{created:?}");
    assert!(created.contains(&today) && created.contains(&"presence_change_default".to_owned()));

    run(
        pool,
        "CREATE TABLE presence_change_20010203 PARTITION OF presence_change
             FOR VALUES FROM ('2001-02-03Z') TO ('2001-02-04Z');
         INSERT INTO presence_change (object_id, at, last_seen, is_online)
             VALUES (1, '2001-02-03 12:00Z', now(), true)",
    )
    .await;
    while store.maintain_history().await.unwrap() {}
    assert_eq!(partitions(pool).await.len(), 10, "the latest change was deleted");
    store.record_seen(&[seen(2, HOUR)]).await.unwrap();
    while store.maintain_history().await.unwrap() {}
    assert_eq!(partitions(pool).await, created);
    run(pool, &format!("DROP TABLE {today}")).await;
    while store.maintain_history().await.unwrap() {}
    assert_eq!(partitions(pool).await, created);
}

/// A reader of another server may have returned a position that a standby does not have yet.
#[tokio::test]
async fn standby_does_not_refuse_a_position_that_it_lacks() {
    let primary = PostgresCluster::start().await;
    let standby = primary.start_standby().await;
    let store = start(primary.url(), 2);
    ready(&store).await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    let (on_primary, on_standby) =
        (History::new(&config(primary.url())), History::new(&config(standby.url())));
    let last = on_primary.extent().await.unwrap().unwrap().last.position;
    assert!(on_standby.has_all_after(last + 1_000).await.unwrap());
    assert!(!on_primary.has_all_after(last + 1_000).await.unwrap());
}

/// The routine was away for longer than it creates partitions in advance.
#[tokio::test]
async fn changes_without_a_partition_are_kept_and_expire() {
    let (database, store) = open().await;
    let pool = database.pool();
    let history = History::new(&config(database.url()));
    for partition in partitions(pool).await {
        if partition != "presence_change_default" {
            run(pool, &format!("DROP TABLE {partition}")).await;
        }
    }
    store.record_seen(&[seen(1, 2 * HOUR)]).await.unwrap();
    delete_stale(&store, HOUR, 10).await.unwrap();
    // Today has no partition of its own, because the default one has its rows.
    while store.maintain_history().await.unwrap() {}
    assert_eq!(partitions(pool).await.len(), 8);
    wait_until("both changes are readable", async || readable(&history).await == 2).await;
    run(pool, "UPDATE presence_change SET at = at - interval '31 d' WHERE is_online").await;
    while store.maintain_history().await.unwrap() {}
    assert_eq!(readable(&history).await, 1);
}

#[tokio::test]
async fn objects_are_recorded_while_the_history_cannot_be_written() {
    let (database, store) = open().await;
    let pool = database.pool();
    let mut status = store.history_status().unwrap();
    status.wait_for(Result::is_ok).await.unwrap();
    for (breaks, part, repairs) in [
        (
            "ALTER TABLE presence_change RENAME TO elsewhere; CREATE VIEW presence_change AS SELECT 1 AS position",
            "no default partition",
            "DROP VIEW presence_change; ALTER TABLE elsewhere RENAME TO presence_change",
        ),
        (
            "ALTER TABLE presence_change DETACH PARTITION presence_change_default",
            "no default partition",
            "ALTER TABLE presence_change ATTACH PARTITION presence_change_default DEFAULT",
        ),
    ] {
        run(pool, breaks).await;
        let reported = status
            .wait_for(|status| status.as_ref().is_err_and(|reason| reason.contains(part)))
            .await
            .map(drop);
        reported.unwrap();
        let recorded = store.record_seen(&[seen(1, 2 * HOUR)]).await.unwrap();
        assert_eq!(recorded.inserted.len(), 1);
        assert_eq!(delete_stale(&store, HOUR, 10).await.unwrap(), 1);
        run(pool, repairs).await;
        status.wait_for(Result::is_ok).await.unwrap();
    }
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    let history = History::new(&config(database.url()));
    assert_eq!(history.latest(1).await.unwrap().unwrap().presence, Presence::Online);
}

#[tokio::test]
async fn dropped_history_begins_anew_at_a_higher_position() {
    let (database, store) = open().await;
    let history = History::new(&config(database.url()));
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    let before = history.extent().await.unwrap().unwrap().last.position;
    run(database.pool(), "DROP TABLE presence_change").await;
    drop(store);
    let store = start(database.url(), 1);
    ready(&store).await;
    store.record_seen(&[seen(2, HOUR)]).await.unwrap();
    let extent = history.extent().await.unwrap().unwrap();
    assert!(extent.first.position > before + 1, "{extent:?}, before: {before}");
}

#[tokio::test]
async fn go_table_has_a_history_too() {
    let database = testkit::Database::new().await;
    run(database.pool(), GO_TABLE).await;
    let store = start(database.url(), 1);
    ready(&store).await;
    store.record_seen(&[seen(1, 2 * HOUR)]).await.unwrap();
    let gone = store.delete_stale(store.now().await.unwrap().before(HOUR), 10).await.unwrap();
    let history = History::new(&config(database.url()));
    let last = history.latest(1).await.unwrap().unwrap();
    assert_eq!((last.presence, last.last_seen), (Presence::Gone, gone[0].last_seen));
}
