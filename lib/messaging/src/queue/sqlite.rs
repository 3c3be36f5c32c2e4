//! The queue in a file that one process owns.
//!
//! A message is a row of `message` until it is acked. Only the process's memory says which messages
//! are in flight: after a crash, every row is delivered again.
//!
//! Decision: docs/decisions/0063-how-does-the-queue-in-a-file-deliver.md

mod consumer;
mod delivery;
mod inspector;
mod queue;
mod queue_monitor;
mod unsettled;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::queue::error::PublishError;
use crate::queue::origin::Origin;

pub(crate) use consumer::Consumer;
pub(crate) use delivery::Delivery;
pub(crate) use inspector::Inspector;
pub(crate) use queue::{FORMAT, Queue, SPOOL, oldest_at};

/// See [`crate::queue::Publisher::publish_ids`].
pub(crate) async fn publish(
    queue: &Arc<Queue>,
    origin: Origin<'_>,
    ids: &[i64],
    within: Duration,
) -> Result<(), PublishError> {
    let published = async {
        let outcome = queue.publish(origin, ids).await;
        let label = if outcome.is_ok() { "confirmed" } else { "refused" };
        metrics::counter!("lastseen_published_total", "outcome" => label)
            .increment(ids.len() as u64);
        outcome.map_err(|error| PublishError::Away(error.to_string()))
    };
    timeout(within, published).await.unwrap_or(Err(PublishError::Timeout(within)))
}
