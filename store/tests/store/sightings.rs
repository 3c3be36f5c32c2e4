use std::sync::Arc;
use std::time::Duration;

use store::Sighting;
use testbed::eventually;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::{DEADLINE, HOUR, age_seconds, ids, last_seen, open, seen};

#[tokio::test]
async fn a_sighting_is_written_with_the_databases_clock_less_its_age() {
    let (database, store) = open().await;
    let clock = "SELECT clock_timestamp()::text";
    let before: String = sqlx::query_scalar(clock).fetch_one(database.pool()).await.unwrap();
    let sightings = [seen(-3, Duration::ZERO), seen(7, Duration::from_millis(90_500))];
    store.record_seen(&sightings).await.unwrap();

    let sql = "SELECT count(*) FROM object,
                   (VALUES (-3::bigint, interval '0 s'), (7, interval '90.5 s')) AS wanted (key, age)
               WHERE id = key
                 AND last_seen BETWEEN $1::text::timestamptz - age AND clock_timestamp() - age";
    let right: i64 = sqlx::query_scalar(sql).bind(before).fetch_one(database.pool()).await.unwrap();
    assert_eq!(
        right,
        2,
        "{} {}",
        last_seen(database.pool(), -3).await,
        last_seen(database.pool(), 7).await
    );
}

#[tokio::test]
async fn a_later_record_moves_a_row_forward_and_never_back() {
    let (database, store) = open().await;
    let pool = database.pool();
    store.record_seen(&[seen(1, HOUR / 2), seen(2, HOUR / 2)]).await.unwrap();
    let before = last_seen(pool, 1).await;

    store.record_seen(&[seen(1, HOUR), seen(2, Duration::ZERO), seen(3, HOUR)]).await.unwrap();
    assert_eq!(last_seen(pool, 1).await, before);
    assert!(age_seconds(pool, 2).await < 600.0);
    assert!(age_seconds(pool, 3).await > 3_599.0);

    store.record_seen(&[seen(1, Duration::ZERO)]).await.unwrap();
    assert!(age_seconds(pool, 1).await < 600.0);
}

#[tokio::test]
async fn the_ends_of_64_bits_are_recorded_and_an_empty_batch_is_nothing() {
    let (database, store) = open().await;
    store.record_seen(&[]).await.unwrap();
    assert!(ids(database.pool()).await.is_empty());
    let ends = [seen(i64::MIN, Duration::ZERO), seen(i64::MAX, Duration::ZERO)];
    store.record_seen(&ends).await.unwrap();
    assert_eq!(ids(database.pool()).await, [i64::MIN, i64::MAX]);
}

#[tokio::test]
async fn writers_whose_batches_overlap_never_deadlock() {
    let (database, store) = open().await;
    let store = Arc::new(store);
    let mut writers = JoinSet::new();
    for writer in 0..8 {
        let store = Arc::clone(&store);
        writers.spawn(async move {
            for round in 0..25 {
                // Each batch of another stride, so that any two overlap in part.
                let stride = usize::try_from(1 + (writer + round) % 5).unwrap();
                let batch: Vec<Sighting> =
                    (1..=400).step_by(stride).map(|id| seen(id, Duration::ZERO)).collect();
                store.record_seen(&batch).await.unwrap();
            }
        });
    }
    timeout(4 * DEADLINE, writers.join_all()).await.unwrap();
    assert_eq!(ids(database.pool()).await, (1..=400).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_sighting_of_a_row_that_is_being_deleted_waits_and_brings_it_back() {
    let (database, store) = open().await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();
    let mut deletion = database.pool().begin().await.unwrap();
    sqlx::query("DELETE FROM object WHERE id = 1").execute(&mut *deletion).await.unwrap();

    let upsert = tokio::spawn(async move { store.record_seen(&[seen(1, Duration::ZERO)]).await });
    let waiting = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND wait_event_type = 'Lock'";
    eventually("the upsert waits for the deletion", DEADLINE, async || {
        let waiting: i64 = sqlx::query_scalar(waiting).fetch_one(database.pool()).await.unwrap();
        (waiting == 1).then_some(())
    })
    .await;
    deletion.commit().await.unwrap();
    timeout(DEADLINE, upsert).await.unwrap().unwrap().unwrap();
    assert!(age_seconds(database.pool(), 1).await < 600.0);
}

#[tokio::test]
async fn sightings_and_deletions_of_the_same_rows_do_not_fail_each_other() {
    const ROWS: i64 = 3_000;
    let (database, store) = open().await;
    let online: Vec<Sighting> = (1..=ROWS).map(|id| seen(id, Duration::ZERO)).collect();
    for _ in 0..8 {
        // The rows lie in the opposite order of their ids, so a deletion comes upon them from the
        // other side than the sightings do: the best chance for a deadlock.
        sqlx::query("TRUNCATE object").execute(database.pool()).await.unwrap();
        let stale = "INSERT INTO object
                     SELECT id, now() - interval '2 h' FROM generate_series($1, 1, -1) AS id";
        sqlx::query(stale).bind(ROWS).execute(database.pool()).await.unwrap();

        let record = || store.record_seen(&online);
        let delete = || store.delete_stale(HOUR, 2_000);
        let together = async { tokio::join!(record(), delete(), record(), delete()) };
        let (one, two, three, four) = Box::pin(timeout(DEADLINE, together)).await.unwrap();
        one.and(three).unwrap();
        two.and(four).unwrap();
        assert_eq!(ids(database.pool()).await, (1..=ROWS).collect::<Vec<_>>());
    }
}
