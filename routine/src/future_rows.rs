//! Rows that are dated in the future.
//!
//! Decision: docs/decisions/0047-how-are-rows-dated-in-the-future-handled.md

use store::{Store, StoreError};

/// Corrects rows that are dated in the future: a clock was set back, or another program wrote them.
/// They would be online until their time comes.
#[derive(Default)]
pub(crate) struct FutureRows {
    /// Whether the last round found some, or failed: one warning is enough for as long as that goes on.
    reported: bool,
}

impl FutureRows {
    /// Dates all of them now, `batch_max` with one statement, so that they become stale after
    /// `OBJECT_TTL` unless they are seen again. Stale rows are deleted even if this fails.
    pub(crate) async fn correct(&mut self, store: &Store, batch_max: u32) {
        match correct_all(store, batch_max).await {
            Ok(0) => self.reported = false,
            Ok(rows) if !self.reported => {
                tracing::warn!(
                    rows,
                    "rows were dated in the future and are now dated now; check the clocks of the \
                     database and of everything else that writes to the table"
                );
                self.reported = true;
            }
            Ok(rows) => tracing::debug!(rows, "more rows were dated in the future"),
            Err(error) if !self.reported => {
                tracing::warn!(%error, "rows that are dated in the future stay; trying again");
                self.reported = true;
            }
            Err(error) => tracing::debug!(%error, "rows that are dated in the future still stay"),
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
