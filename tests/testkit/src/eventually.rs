//! Waits for conditions.

use std::time::Duration;

const POLL_INTERVAL: Duration = Duration::from_millis(25);
/// Far longer than any step of a test takes, because a machine that runs all tests at once is slow.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Waits until `condition` is true. Panics with `what` after [`PATIENCE`].
pub async fn wait_until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    wait_for(what, async || condition().await.then_some(())).await;
}

/// Polls until `condition` returns a value, and returns that value. Panics with `what` after
/// [`PATIENCE`].
pub async fn wait_for<T>(what: &str, condition: impl AsyncFnMut() -> Option<T>) -> T {
    eventually(what, PATIENCE, condition).await
}

/// Like [`wait_for`] with another time limit, which also cuts off a poll that hangs.
pub async fn eventually<T>(
    what: &str,
    within: Duration,
    mut condition: impl AsyncFnMut() -> Option<T>,
) -> T {
    let polled = async {
        loop {
            if let Some(value) = condition().await {
                return value;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    };
    let value = tokio::time::timeout(within, polled).await;
    value.unwrap_or_else(|_| panic!("not within {within:?}: {what}"))
}
