//! Waiting on conditions.

use std::time::Duration;

const POLL_INTERVAL: Duration = Duration::from_millis(25);

/// Polls until `condition` gives a value, and hands it over.
///
/// # Panics
/// With `what` when there is none `within` that time; a poll that hangs is cut off by it as well.
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
