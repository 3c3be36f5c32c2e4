use std::time::Duration;

use store::Objects;

use crate::backend::{Backend, insert};
use crate::{HOUR, delete_stale, seen};

on_both! {
    pages_list_all_objects_in_ascending_order,
    all_objects_are_counted,
    open_reader_sees_each_committed_change,
    all_ages_of_a_page_are_from_one_clock_reading,
}

async fn pages_list_all_objects_in_ascending_order(backend: &Backend) {
    let store = backend.open().await;
    let ids = [i64::MIN, -5, 0, 3, 4, 8, i64::MAX - 1, i64::MAX];
    store.record_seen(&ids.map(|id| seen(id, HOUR))).await.unwrap();
    let mut objects = Objects::open(&backend.config()).await.unwrap();
    let mut pages = Vec::new();
    let mut after = None;
    for _ in 0..4 {
        let page = objects.page(after, 3).await.unwrap();
        after = page.last().map(|object| object.id).or(after);
        pages.push(page.iter().map(|object| object.id).collect::<Vec<_>>());
    }
    assert_eq!(pages, [&ids[..3], &ids[3..6], &ids[6..], &[]]);
    let after_3 = objects.page(Some(3), 2).await.unwrap();
    assert_eq!(after_3.iter().map(|object| object.id).collect::<Vec<_>>(), [4, 8]);
    assert!(objects.page(None, 0).await.unwrap().is_empty());
}

async fn all_objects_are_counted(backend: &Backend) {
    let store = backend.open().await;
    let mut objects = Objects::open(&backend.config()).await.unwrap();
    assert_eq!(objects.count().await.unwrap(), 0);
    insert(&store, -5_000..=4_999, HOUR).await;
    insert(&store, 4_000..=4_999, Duration::ZERO).await;
    assert_eq!(objects.count().await.unwrap(), 10_000);
    assert_eq!(delete_stale(&store, HOUR / 2, 10_000).await.unwrap(), 9_000);
    assert_eq!(objects.count().await.unwrap(), 1_000);
}

async fn open_reader_sees_each_committed_change(backend: &Backend) {
    let store = backend.open().await;
    let mut objects = Objects::open(&backend.config()).await.unwrap();
    for id in 1..=20 {
        store.record_seen(&[seen(id, HOUR)]).await.unwrap();
        assert_eq!(objects.page(Some(id - 1), 10).await.unwrap().len(), 1);
    }
    assert_eq!(delete_stale(&store, HOUR / 2, 15).await.unwrap(), 15);
    assert_eq!(objects.page(None, 10).await.unwrap().len(), 5);
}

async fn all_ages_of_a_page_are_from_one_clock_reading(backend: &Backend) {
    let store = backend.open().await;
    insert(&store, 1..=10, HOUR).await;
    store.record_seen(&[seen(1, Duration::ZERO), seen(2, HOUR / 2)]).await.unwrap();
    let objects = backend.objects().await;
    let now = objects[0].last_seen + objects[0].age;
    assert!(objects.iter().all(|object| object.last_seen + object.age == now), "{objects:?}");
    let later = backend.object(10).await;
    assert!(later.last_seen + later.age >= now);
}
