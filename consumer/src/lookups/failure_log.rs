//! What is said of lookups that fail.

use std::sync::{Mutex, PoisonError};

use tokio::time::{Duration, Instant};

use crate::status_api::LookupError;

/// Tells of failed lookups in at most one line every few seconds: when the API is down, each of
/// hundreds per second fails, and they all say the same.
#[derive(Default)]
pub(super) struct FailureLog(Mutex<Failures>);

#[derive(Default)]
struct Failures {
    untold: u32,
    told_at: Option<Instant>,
}

impl FailureLog {
    const INTERVAL: Duration = Duration::from_secs(5);

    pub(super) fn note(&self, id: i64, callback_id: &str, error: &LookupError) {
        let reason = error.to_string();
        let mut failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        failures.untold += 1;
        if failures.told_at.is_some_and(|told_at| told_at.elapsed() < Self::INTERVAL) {
            return;
        }
        let count = std::mem::take(&mut failures.untold);
        failures.told_at = Some(Instant::now());
        tracing::warn!(
            count,
            id,
            callback_id,
            reason,
            "lookups failed, this one the latest; they will be tried again"
        );
    }
}
