use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use store::{Recorded, Row, Sighting};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::backend::Backend;
use crate::{DEADLINE, HOUR, delete_stale, seen};

/// The precision of `last_seen` in a file.
const MILLISECOND: Duration = Duration::from_millis(1);

on_both! {
    last_seen_is_the_databases_clock_minus_the_age,
    recorded_sighting_is_visible_to_others_at_once,
    later_sighting_moves_a_row_forward_older_never_back,
    inserted_and_updated_rows_are_returned_as_in_the_table,
    sighting_older_than_its_row_is_not_returned,
    age_that_reaches_back_before_1970_counts_as_1970,
    extreme_ids_and_an_empty_batch_are_recorded,
    writers_whose_batches_overlap_never_deadlock,
}

async fn last_seen_is_the_databases_clock_minus_the_age(backend: &Backend) {
    let store = backend.open().await;
    let started = Instant::now();
    let sightings = [seen(-3, Duration::ZERO), seen(7, Duration::from_millis(90_500))];
    store.record_seen(&sightings).await.unwrap();
    let objects = backend.objects().await;
    let took = started.elapsed();
    for (sighting, object) in sightings.iter().zip(&objects) {
        assert_eq!(object.id, sighting.id);
        let since_recorded = (object.age + MILLISECOND).checked_sub(sighting.age);
        assert!(since_recorded.is_some_and(|age| age <= took + 2 * MILLISECOND), "{object:?}");
    }
}

async fn recorded_sighting_is_visible_to_others_at_once(backend: &Backend) {
    let store = backend.open().await;
    for id in 1..=20 {
        store.record_seen(&[seen(id, Duration::ZERO)]).await.unwrap();
        assert_eq!(backend.ids().await, (1..=id).collect::<Vec<_>>());
    }
}

async fn later_sighting_moves_a_row_forward_older_never_back(backend: &Backend) {
    let store = backend.open().await;
    store.record_seen(&[seen(1, HOUR / 2), seen(2, HOUR / 2)]).await.unwrap();
    let before = backend.object(1).await.last_seen;

    store.record_seen(&[seen(1, HOUR), seen(2, Duration::ZERO), seen(3, HOUR)]).await.unwrap();
    assert_eq!(backend.object(1).await.last_seen, before);
    assert!(backend.object(2).await.age < HOUR / 6);
    assert!(backend.object(3).await.age + MILLISECOND >= HOUR);

    store.record_seen(&[seen(1, Duration::ZERO)]).await.unwrap();
    assert!(backend.object(1).await.age < HOUR / 6);
}

async fn inserted_and_updated_rows_are_returned_as_in_the_table(backend: &Backend) {
    let store = backend.open().await;
    let first = store.record_seen(&[seen(-7, HOUR), seen(5, HOUR)]).await.unwrap();
    assert_eq!((sorted(&first.inserted).len(), first.updated.len()), (2, 0));
    assert_eq!(sorted(&first.inserted), rows(backend).await);

    // No sighting has age zero, because a row of this millisecond is not stale below.
    let batch = [seen(-7, HOUR / 4), seen(3, HOUR), seen(5, HOUR / 2)];
    let second = store.record_seen(&batch).await.unwrap();
    let rows = rows(backend).await;
    assert_eq!(sorted(&second.inserted), [rows[1]]);
    assert_eq!(sorted(&second.updated), [rows[0], rows[2]]);

    // Once deleted, a row that is seen again counts as inserted.
    let now = store.now().await.unwrap();
    store.delete_stale(now.before(Duration::ZERO), 100).await.unwrap();
    let third = store.record_seen(&[seen(3, Duration::ZERO)]).await.unwrap();
    assert_eq!((sorted(&third.inserted), third.updated.len()), (self::rows(backend).await, 0));
}

async fn sighting_older_than_its_row_is_not_returned(backend: &Backend) {
    let store = backend.open().await;
    store.record_seen(&[seen(1, HOUR / 2), seen(2, HOUR / 2)]).await.unwrap();
    let recorded = store.record_seen(&[seen(1, HOUR), seen(2, Duration::ZERO)]).await.unwrap();
    assert!(recorded.inserted.is_empty(), "{recorded:?}");
    assert_eq!(recorded.updated.iter().map(|row| row.id).collect::<Vec<_>>(), [2]);
    assert_eq!(store.record_seen(&[]).await.unwrap(), Recorded::default());
}

/// The rows in the format and order of [`rows`].
fn sorted(rows: &[Row]) -> Vec<(i64, SystemTime)> {
    let mut sorted: Vec<_> = rows.iter().map(|row| (row.id, row.last_seen.time())).collect();
    sorted.sort_unstable();
    sorted
}

async fn rows(backend: &Backend) -> Vec<(i64, SystemTime)> {
    let objects = backend.objects().await;
    objects.iter().map(|object| (object.id, object.last_seen)).collect()
}

async fn age_that_reaches_back_before_1970_counts_as_1970(backend: &Backend) {
    let store = backend.open().await;
    let years = Duration::from_hours(365 * 24);
    let ages = [40 * years, 100 * years, 400 * years, 10_000 * years, Duration::MAX];
    let sightings: Vec<Sighting> = (0..).zip(ages).map(|(id, age)| seen(id, age)).collect();
    store.record_seen(&sightings).await.unwrap();
    let objects = backend.objects().await;
    assert!(objects[0].last_seen > SystemTime::UNIX_EPOCH + years);
    for object in &objects[1..] {
        assert_eq!(object.last_seen, SystemTime::UNIX_EPOCH, "{object:?}");
    }

    store.record_seen(&[seen(4, Duration::ZERO)]).await.unwrap();
    assert!(backend.object(4).await.age < HOUR);
    assert_eq!(delete_stale(&store, HOUR, 100).await.unwrap(), 4);
}

async fn extreme_ids_and_an_empty_batch_are_recorded(backend: &Backend) {
    let store = backend.open().await;
    store.record_seen(&[]).await.unwrap();
    assert!(backend.ids().await.is_empty());
    let ends = [seen(i64::MIN, Duration::ZERO), seen(i64::MAX, Duration::ZERO)];
    store.record_seen(&ends).await.unwrap();
    assert_eq!(backend.ids().await, [i64::MIN, i64::MAX]);
}

async fn writers_whose_batches_overlap_never_deadlock(backend: &Backend) {
    let store = Arc::new(backend.open().await);
    let mut writers = JoinSet::new();
    for writer in 0..8 {
        let store = Arc::clone(&store);
        writers.spawn(async move {
            for round in 0..25 {
                // Batches have different strides, so that any two overlap in part.
                let stride = usize::try_from(1 + (writer + round) % 5).unwrap();
                let batch: Vec<Sighting> =
                    (1..=400).step_by(stride).map(|id| seen(id, Duration::ZERO)).collect();
                store.record_seen(&batch).await.unwrap();
            }
        });
    }
    timeout(4 * DEADLINE, writers.join_all()).await.unwrap();
    assert_eq!(backend.ids().await, (1..=400).collect::<Vec<_>>());
}
