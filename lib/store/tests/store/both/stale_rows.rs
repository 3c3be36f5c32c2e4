use std::time::Duration;

use store::Store;
use tokio::time::timeout;

use crate::backend::{Backend, insert};
use crate::{DEADLINE, HOUR, delete_stale, seen};

const MINUTE: Duration = Duration::from_mins(1);

on_both! {
    only_rows_older_than_the_ttl_are_deleted,
    nothing_is_stale_if_the_ttl_reaches_back_before_1970,
    row_ages_are_relative_to_the_passed_clock_reading,
    deleted_rows_are_returned_with_their_last_seen,
    one_call_deletes_no_more_than_its_limit,
    two_replicas_together_delete_each_stale_row_once,
    concurrent_sightings_and_deletions_lose_no_seen_object,
}

async fn only_rows_older_than_the_ttl_are_deleted(backend: &Backend) {
    let store = backend.open().await;
    insert(&store, 1..=3, HOUR + MINUTE).await;
    insert(&store, 4..=6, 50 * MINUTE).await;
    assert_eq!(delete_stale(&store, HOUR, 100).await.unwrap(), 3);
    assert_eq!(backend.ids().await, [4, 5, 6]);
    assert_eq!(delete_stale(&store, HOUR, 100).await.unwrap(), 0);
}

async fn nothing_is_stale_if_the_ttl_reaches_back_before_1970(backend: &Backend) {
    let store = backend.open().await;
    store.record_seen(&[seen(1, HOUR), seen(2, Duration::MAX)]).await.unwrap();
    for ttl in [1_000_000 * HOUR, 10_000_000 * HOUR, Duration::MAX] {
        assert_eq!(delete_stale(&store, ttl, 100).await.unwrap(), 0, "{ttl:?}");
    }
    assert_eq!(backend.ids().await, [1, 2]);
}

async fn row_ages_are_relative_to_the_passed_clock_reading(backend: &Backend) {
    let store = backend.open().await;
    let before = store.now().await.unwrap();
    insert(&store, 1..=3, Duration::ZERO).await;
    let after = loop {
        let now = store.now().await.unwrap();
        if now.ahead_of(before) > Duration::from_millis(10) {
            break now;
        }
    };
    assert_eq!(before.ahead_of(after), Duration::ZERO);
    assert_eq!(store.delete_stale(before.before(Duration::ZERO), 100).await.unwrap(), []);
    assert_eq!(store.delete_stale(after.before(Duration::ZERO), 100).await.unwrap().len(), 3);
}

async fn deleted_rows_are_returned_with_their_last_seen(backend: &Backend) {
    let store = backend.open().await;
    insert(&store, 1..=3, 2 * HOUR).await;
    insert(&store, 4..=4, Duration::ZERO).await;
    let before = backend.objects().await;
    let cutoff = store.now().await.unwrap().before(HOUR);
    let mut gone = store.delete_stale(cutoff, 100).await.unwrap();
    gone.sort_unstable_by_key(|row| row.id);
    let gone: Vec<_> = gone.iter().map(|row| (row.id, row.last_seen.time())).collect();
    let rows: Vec<_> = before.iter().map(|object| (object.id, object.last_seen)).collect();
    assert_eq!(gone, rows[..3]);
}

async fn one_call_deletes_no_more_than_its_limit(backend: &Backend) {
    let store = backend.open().await;
    insert(&store, 1..=25, 2 * HOUR).await;
    for (deleted, left) in [(10, 15), (10, 5), (5, 0), (0, 0)] {
        assert_eq!(delete_stale(&store, HOUR, 10).await.unwrap(), deleted);
        assert_eq!(backend.ids().await.len(), left);
    }
}

async fn two_replicas_together_delete_each_stale_row_once(backend: &Backend) {
    const STALE: i64 = 5_000;
    const LIMIT: u32 = 100;
    let (one, other) = backend.open_two().await;
    insert(&one, 1..=STALE, 2 * HOUR).await;
    insert(&one, STALE + 1..=STALE + 5, Duration::ZERO).await;

    let drain = async |store: &Store| {
        let mut deleted = 0;
        loop {
            let batch = delete_stale(store, HOUR, LIMIT).await.unwrap();
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
    assert_eq!(backend.ids().await, (STALE + 1..=STALE + 5).collect::<Vec<_>>());
}

async fn concurrent_sightings_and_deletions_lose_no_seen_object(backend: &Backend) {
    const ROWS: i64 = 1_000;
    // The stores of the consumer and of the routine.
    let (consumers, routines) = backend.open_two().await;
    for first in (0..8).map(|round| round * ROWS) {
        let ids = first..=first + ROWS - 1;
        insert(&consumers, ids.clone(), 2 * HOUR).await;
        let record = || insert(&consumers, ids.clone(), Duration::ZERO);
        let delete = || delete_stale(&routines, HOUR, 400);
        let together = async { tokio::join!(delete(), record(), delete(), record(), delete()) };
        let (one, (), two, (), three) = Box::pin(timeout(DEADLINE, together)).await.unwrap();
        one.and(two).and(three).unwrap();
    }
    assert_eq!(backend.ids().await, (0..8 * ROWS).collect::<Vec<_>>());
}
