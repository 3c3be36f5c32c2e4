//! Rows that are dated in the future.
//!
//! Decision: docs/decisions/0047-how-are-rows-dated-in-the-future-handled.md

use store::{Store, StoreError};

/// Corrects rows whose `last_seen` is in the future. Such rows exist after a clock was set back, or
/// if another program wrote them. Uncorrected, their objects would count as online until that time.
#[derive(Default)]
pub(crate) struct FutureRows {
    /// Whether the last cleanup found such rows or failed to correct them. The next cleanup then
    /// logs no second warning.
    is_reported: bool,
}

impl FutureRows {
    /// Sets `last_seen` of these rows to now, `batch_max` rows per statement, so that they become
    /// stale after `OBJECT_TTL` unless their objects are seen again. Only logs a failure, so that
    /// the cleanup continues.
    pub(crate) async fn correct(&mut self, store: &Store, batch_max: u32) {
        match correct_all(store, batch_max).await {
            Ok(0) => self.is_reported = false,
            Ok(rows) if !self.is_reported => {
                tracing::warn!(
                    rows,
                    "rows were dated in the future; their time was set to now; check the clocks \
                    of the database and of other programs that write to the table"
                );
                self.is_reported = true;
            }
            Ok(rows) => tracing::debug!(rows, "more rows were dated in the future"),
            Err(error) if !self.is_reported => {
                tracing::warn!(%error, "cannot correct rows dated in the future; trying again");
                self.is_reported = true;
            }
            Err(error) => tracing::debug!(%error, "still cannot correct rows dated in the future"),
        }
    }
}

async fn correct_all(store: &Store, batch_max: u32) -> Result<u64, StoreError> {
    let mut rows = 0;
    loop {
        let corrected = store.correct_future(batch_max).await?;
        rows += corrected;
        if corrected < u64::from(batch_max) {
            return Ok(rows);
        }
    }
}
