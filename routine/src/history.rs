//! The maintenance of the history: creates partitions in advance, and deletes old changes.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use store::{Store, StoreError};

/// The interval of the maintenance, and of the next attempt after a failure. Partitions exist for
/// days in advance, so neither is urgent.
const INTERVAL: Duration = Duration::from_mins(10);
const RETRY_INTERVAL: Duration = Duration::from_mins(1);

/// Maintains the history once now, and then regularly.
pub(crate) async fn maintain_forever(store: Arc<Store>) -> Infallible {
    let mut is_failing = false;
    loop {
        // An error means that the monitor of the store has ended, which the supervisor reports.
        _ = store.status().wait_for(Result::is_ok).await;
        let result = maintain(&store).await;
        match &result {
            Err(error) if !is_failing => {
                tracing::warn!(%error, "cannot maintain the history; trying again until it succeeds");
            }
            Err(error) => tracing::debug!(%error, "still cannot maintain the history"),
            Ok(()) if is_failing => tracing::info!("maintained the history again"),
            Ok(()) => {}
        }
        is_failing = result.is_err();
        tokio::time::sleep(if is_failing { RETRY_INTERVAL } else { INTERVAL }).await;
    }
}

/// Maintains the history once.
pub(crate) async fn maintain(store: &Store) -> Result<(), StoreError> {
    while store.maintain_history().await? {}
    Ok(())
}
