//! The store on both its databases. One binary, because each takes seconds to link.

#![expect(clippy::unwrap_used, reason = "the helpers of tests are tests as well")]

mod backend;
mod both;
mod postgres;
mod sqlite;

use std::time::Duration;

use store::{Sighting, Store, StoreError};
use tokio::time::timeout;

/// Far more than anything here needs, because a machine that runs all tests at once is slow.
const DEADLINE: Duration = Duration::from_secs(30);
const HOUR: Duration = Duration::from_hours(1);

fn seen(id: i64, age: Duration) -> Sighting {
    Sighting { id, age }
}

/// Deletes what is older than `ttl` by the database's clock, and says how much that was.
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

/// Drops a store, and waits until it is gone.
async fn close(store: Store) {
    let mut status = store.status();
    drop(store);
    let gone = async { while status.changed().await.is_ok() {} };
    timeout(DEADLINE, gone).await.unwrap();
}
