use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use store::{Recorded, Row, Sighting};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::backend::Backend;
use crate::{DEADLINE, HOUR, delete_stale, seen};

/// The objects' times are cut to it.
const MILLISECOND: Duration = Duration::from_millis(1);

on_both! {
    a_sighting_is_written_with_the_databases_clock_less_its_age,
    a_sighting_is_there_for_others_as_soon_as_it_is_recorded,
    a_later_record_moves_a_row_forward_and_never_back,
    what_was_inserted_and_what_was_updated_is_told_apart_and_as_it_is_in_the_table,
    a_sighting_that_is_older_than_its_row_is_not_told,
    an_age_that_reaches_back_before_1970_counts_as_1970,
    the_ends_of_64_bits_are_recorded_and_an_empty_batch_is_nothing,
    writers_whose_batches_overlap_never_deadlock,
}

async fn a_sighting_is_written_with_the_databases_clock_less_its_age(backend: &Backend) {
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

async fn a_sighting_is_there_for_others_as_soon_as_it_is_recorded(backend: &Backend) {
    let store = backend.open().await;
    for id in 1..=20 {
        store.record_seen(&[seen(id, Duration::ZERO)]).await.unwrap();
        assert_eq!(backend.ids().await, (1..=id).collect::<Vec<_>>());
    }
}

async fn a_later_record_moves_a_row_forward_and_never_back(backend: &Backend) {
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

async fn what_was_inserted_and_what_was_updated_is_told_apart_and_as_it_is_in_the_table(
    backend: &Backend,
) {
    let store = backend.open().await;
    let first = store.record_seen(&[seen(-7, HOUR), seen(5, HOUR)]).await.unwrap();
    assert_eq!((told(&first.inserted).len(), first.updated.len()), (2, 0));
    assert_eq!(told(&first.inserted), rows(backend).await);

    // None of this very millisecond, which is not stale yet.
    let batch = [seen(-7, HOUR / 4), seen(3, HOUR), seen(5, HOUR / 2)];
    let second = store.record_seen(&batch).await.unwrap();
    let rows = rows(backend).await;
    assert_eq!(told(&second.inserted), [rows[1]]);
    assert_eq!(told(&second.updated), [rows[0], rows[2]]);

    // Deleted and seen again, it is new again.
    let now = store.now().await.unwrap();
    store.delete_stale(now, 100).await.unwrap();
    let third = store.record_seen(&[seen(3, Duration::ZERO)]).await.unwrap();
    assert_eq!((told(&third.inserted), third.updated.len()), (self::rows(backend).await, 0));
}

async fn a_sighting_that_is_older_than_its_row_is_not_told(backend: &Backend) {
    let store = backend.open().await;
    store.record_seen(&[seen(1, HOUR / 2), seen(2, HOUR / 2)]).await.unwrap();
    let recorded = store.record_seen(&[seen(1, HOUR), seen(2, Duration::ZERO)]).await.unwrap();
    assert!(recorded.inserted.is_empty(), "{recorded:?}");
    assert_eq!(recorded.updated.iter().map(|row| row.id).collect::<Vec<_>>(), [2]);
    assert_eq!(store.record_seen(&[]).await.unwrap(), Recorded::default());
}

/// As the table has it, too.
fn told(rows: &[Row]) -> Vec<(i64, SystemTime)> {
    let mut told: Vec<_> = rows.iter().map(|row| (row.id, row.last_seen.time())).collect();
    told.sort_unstable();
    told
}

async fn rows(backend: &Backend) -> Vec<(i64, SystemTime)> {
    let objects = backend.objects().await;
    objects.iter().map(|object| (object.id, object.last_seen)).collect()
}

async fn an_age_that_reaches_back_before_1970_counts_as_1970(backend: &Backend) {
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

async fn the_ends_of_64_bits_are_recorded_and_an_empty_batch_is_nothing(backend: &Backend) {
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
                // Each batch of another stride, so that any two overlap in part.
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
