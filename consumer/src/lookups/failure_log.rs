//! The log lines about failed lookups.

use std::sync::{Mutex, PoisonError};

use tokio::time::{Duration, Instant};

use crate::status_api::LookupError;

/// Logs failed lookups, at most one line every few seconds: during an outage of the API, hundreds
/// of lookups per second fail for the same reason.
#[derive(Default)]
pub(super) struct FailureLog(Mutex<Failures>);

#[derive(Default)]
struct Failures {
    unlogged: u32,
    logged_at: Option<Instant>,
}

impl FailureLog {
    const INTERVAL: Duration = Duration::from_secs(5);

    pub(super) fn note(&self, id: i64, callback_id: &str, error: &LookupError) {
        let reason = error.to_string();
        let mut failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        failures.unlogged += 1;
        if failures.logged_at.is_some_and(|logged_at| logged_at.elapsed() < Self::INTERVAL) {
            return;
        }
        let count = std::mem::take(&mut failures.unlogged);
        failures.logged_at = Some(Instant::now());
        tracing::warn!(
            count,
            id,
            callback_id,
            reason,
            "lookups failed and will be retried; this line shows the latest one"
        );
    }
}
