use std::time::Duration;

use store::Store;
use tokio::time::timeout;

use crate::{DEADLINE, HOUR, config, ids, insert, open, ready};

const MINUTE: Duration = Duration::from_mins(1);

#[tokio::test]
async fn only_what_is_older_than_the_ttl_is_deleted() {
    let (database, store) = open().await;
    insert(database.pool(), 1..=3, HOUR + MINUTE).await;
    insert(database.pool(), 4..=6, 50 * MINUTE).await;
    assert_eq!(store.delete_stale(HOUR, 100).await.unwrap(), 3);
    assert_eq!(ids(database.pool()).await, [4, 5, 6]);
    assert_eq!(store.delete_stale(HOUR, 100).await.unwrap(), 0);
}

#[tokio::test]
async fn one_call_deletes_no_more_than_its_limit() {
    let (database, store) = open().await;
    insert(database.pool(), 1..=25, 2 * HOUR).await;
    for (deleted, left) in [(10, 15), (10, 5), (5, 0), (0, 0)] {
        assert_eq!(store.delete_stale(HOUR, 10).await.unwrap(), deleted);
        assert_eq!(ids(database.pool()).await.len(), left);
    }
}

#[tokio::test]
async fn a_row_that_another_transaction_has_locked_is_skipped_without_waiting_for_it() {
    let (database, store) = open().await;
    insert(database.pool(), 1..=3, 2 * HOUR).await;
    let mut other = database.pool().begin().await.unwrap();
    sqlx::query("SELECT FROM object WHERE id = 2 FOR UPDATE").execute(&mut *other).await.unwrap();

    // The lock is held until after this call, so a call that waited would end in an error.
    assert_eq!(store.delete_stale(HOUR, 100).await.unwrap(), 2);
    assert_eq!(ids(database.pool()).await, [2]);
    other.rollback().await.unwrap();
    assert_eq!(store.delete_stale(HOUR, 100).await.unwrap(), 1);
}

#[tokio::test]
async fn a_stale_row_whose_sighting_is_being_written_survives() {
    let (database, store) = open().await;
    insert(database.pool(), 1..=1, 2 * HOUR).await;
    let mut sighting = database.pool().begin().await.unwrap();
    let sql = "UPDATE object SET last_seen = now() WHERE id = 1";
    sqlx::query(sql).execute(&mut *sighting).await.unwrap();

    assert_eq!(store.delete_stale(HOUR, 100).await.unwrap(), 0);
    sighting.commit().await.unwrap();
    assert_eq!(store.delete_stale(HOUR, 100).await.unwrap(), 0);
    assert_eq!(ids(database.pool()).await, [1]);
}

#[tokio::test]
async fn two_replicas_at_once_delete_every_stale_row_once_and_report_so() {
    const STALE: i64 = 5_000;
    const LIMIT: u32 = 100;
    let (database, one) = open().await;
    insert(database.pool(), 1..=STALE, 2 * HOUR).await;
    insert(database.pool(), STALE + 1..=STALE + 5, Duration::ZERO).await;
    let other = Store::start(&config(database.url()), "other", 1);
    ready(&other).await;

    let drain = async |store: &Store| {
        let mut deleted = 0;
        loop {
            let batch = store.delete_stale(HOUR, LIMIT).await.unwrap();
            assert!(batch <= u64::from(LIMIT));
            deleted += batch;
            if batch < u64::from(LIMIT) {
                return deleted;
            }
        }
    };
    let both = async { tokio::join!(drain(&one), drain(&other)) };
    let (by_one, by_other) = timeout(DEADLINE, both).await.unwrap();
    assert_eq!(by_one + by_other, 5_000, "{by_one} + {by_other}");
    assert_eq!(ids(database.pool()).await, (STALE + 1..=STALE + 5).collect::<Vec<_>>());
}
