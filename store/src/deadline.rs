//! How long the database may take.

use std::time::Duration;

use tokio::time::timeout;

use crate::StoreError;
use crate::error::Cause;

pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// For one statement, or one batch of them in a file. A Postgres ends it by itself shortly before;
/// this is for one that no longer answers at all, and for a disk that does not.
pub(crate) const QUERY_TIMEOUT: Duration = Duration::from_secs(12);

/// Runs one step with a deadline, which neither sqlx nor SQLite has.
pub(crate) async fn within<T, E: Into<Cause>>(
    limit: Duration,
    failed: fn(Cause) -> StoreError,
    step: impl Future<Output = Result<T, E>>,
) -> Result<T, StoreError> {
    match timeout(limit, step).await {
        Ok(outcome) => outcome.map_err(|error| failed(error.into())),
        Err(_) => Err(StoreError::Timeout(limit)),
    }
}
