//! Rows that are dated in the future.
//!
//! Decision: docs/decisions/0047-how-are-rows-dated-in-the-future-handled.md

use store::{Store, StoreError};

/// Corrects rows that are dated in the future, because a clock was set back or another program
/// wrote them. Uncorrected, they would count as online until that time.
#[derive(Default)]
pub(crate) struct FutureRows {
    /// Whether the last cleanup found such rows or failed to correct them. Only the first of such
    /// cleanups in a row logs a warning.
    is_reported: bool,
}

impl FutureRows {
    /// Sets the time of all such rows to now, `batch_max` rows with each statement, so that they
    /// become stale after `OBJECT_TTL` unless the object is seen again. A failure is only logged,
    /// so that the cleanup continues.
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
