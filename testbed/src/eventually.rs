//! Waits for conditions.

use std::time::Duration;

const POLL_INTERVAL: Duration = Duration::from_millis(25);

/// Polls until `condition` returns a value, and returns that value.
///
/// # Panics
/// When there is no value `within` that time, with `what` in the message. This also cuts off a poll
/// that hangs.
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
