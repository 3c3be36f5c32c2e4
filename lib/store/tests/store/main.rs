//! Tests of the store with both databases. They are one binary, because each binary takes seconds
//! to link.

#![expect(clippy::unwrap_used, reason = "helpers of tests may panic, as tests may")]

mod backend;
mod both;
mod postgres;
mod sqlite;

use std::time::Duration;

use store::{Sighting, Store, StoreError};
use tokio::time::timeout;

/// Deadline of each wait. It is long, because a machine that runs all tests at once is slow.
const DEADLINE: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_hours(1);

fn seen(id: i64, age: Duration) -> Sighting {
    Sighting { id, age }
}

/// Deletes rows older than `ttl` by the database's clock, and returns their number.
async fn delete_stale(store: &Store, ttl: Duration, limit: u32) -> Result<u64, StoreError> {
    let now = store.now().await?;
    let gone = store.delete_stale(now.before(ttl), limit).await?;
    Ok(gone.len() as u64)
}

async fn ready(store: &Store) {
    let mut status = store.status();
    let ready = timeout(DEADLINE, status.wait_for(Result::is_ok)).await;
    assert!(ready.is_ok(), "not ready: {:?}", *store.status().borrow());
}

/// Waits until the store is not ready for a reason that contains `part`, and returns the reason.
async fn unready(store: &Store, part: &str) -> String {
    let mut status = store.status();
    let is_reported =
        |status: &Result<(), String>| status.as_ref().is_err_and(|reason| reason.contains(part));
    let reported = timeout(DEADLINE, status.wait_for(is_reported)).await.map(|_| ());
    assert!(reported.is_ok(), "not {part:?}: {:?}", *store.status().borrow());
    let reason = store.status().borrow().clone();
    reason.unwrap_err()
}

/// Drops a store, and waits until it has stopped.
async fn close(store: Store) {
    let mut status = store.status();
    drop(store);
    let stopped = async { while status.changed().await.is_ok() {} };
    timeout(DEADLINE, stopped).await.unwrap();
}
