//! The deadlines of database operations.

use std::time::Duration;

use tokio::time::timeout;

use crate::StoreError;
use crate::error::Cause;

pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
pub(crate) const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// The deadline of one statement in Postgres, or of one batch of statements in a file. Postgres
/// itself ends a statement shortly before. This deadline is for a server or a disk that no longer
/// responds.
pub(crate) const QUERY_TIMEOUT: Duration = Duration::from_secs(12);

/// Runs one operation with a deadline, because neither sqlx nor SQLite has deadlines.
pub(crate) async fn within<T, E: Into<Cause>>(
    limit: Duration,
    to_error: fn(Cause) -> StoreError,
    operation: impl Future<Output = Result<T, E>>,
) -> Result<T, StoreError> {
    match timeout(limit, operation).await {
        Ok(outcome) => outcome.map_err(|error| to_error(error.into())),
        Err(_) => Err(StoreError::Timeout(limit)),
    }
}
