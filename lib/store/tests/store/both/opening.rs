use std::time::Duration;

use store::{Objects, Store};

use crate::backend::{Backend, insert};
use crate::{HOUR, close, delete_stale, ready, seen};

on_both! {
    recorded_rows_survive_closing_and_reopening,
    stores_that_start_together_on_an_empty_database_become_ready,
    store_stays_open_when_another_one_is_closed,
}

async fn recorded_rows_survive_closing_and_reopening(backend: &Backend) {
    let store = backend.open().await;
    insert(&store, 1..=100, HOUR).await;
    let before = backend.object(7).await.last_seen;
    close(store).await;
    assert_eq!(backend.ids().await, (1..=100).collect::<Vec<_>>());

    let store = backend.open().await;
    store.record_seen(&[seen(7, 2 * HOUR), seen(101, HOUR)]).await.unwrap();
    assert_eq!(backend.object(7).await.last_seen, before);
    assert_eq!(backend.ids().await, (1..=101).collect::<Vec<_>>());
    assert_eq!(delete_stale(&store, HOUR / 2, 1_000).await.unwrap(), 101);
}

async fn stores_that_start_together_on_an_empty_database_become_ready(backend: &Backend) {
    let database = backend.database();
    let stores = [(); 8].map(|()| Store::start(database.clone(), "test", 1));
    for (id, store) in (1..).zip(&stores) {
        ready(store).await;
        store.record_seen(&[seen(id, Duration::ZERO)]).await.unwrap();
    }
    assert_eq!(backend.ids().await, (1..=8).collect::<Vec<_>>());
}

async fn store_stays_open_when_another_one_is_closed(backend: &Backend) {
    let (one, other) = backend.open_two().await;
    insert(&one, 1..=3, HOUR).await;
    let objects = Objects::open(&backend.config()).await.unwrap();
    drop((one, objects));
    insert(&other, 4..=5, Duration::ZERO).await;
    assert!(other.status().borrow().is_ok());
    assert_eq!(delete_stale(&other, HOUR / 2, 10).await.unwrap(), 3);
    assert_eq!(backend.ids().await, [4, 5]);
}
