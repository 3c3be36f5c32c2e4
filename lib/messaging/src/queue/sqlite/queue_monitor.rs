//! Inspects the file every few seconds, for the metrics. It uses its own connection, because
//! counting reads the whole queue and must not hold up writes.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::task::AbortOnDropHandle;

use super::inspector::Inspector;
use super::queue::Queue;
use super::unsettled::Unsettled;
use crate::queue::error::InspectError;
use crate::queue::gauges::{Depths, Gauges};

const INTERVAL: Duration = Duration::from_secs(2);
/// The pause is at least this multiple of the time that counting took: a long queue is counted less
/// often.
const PAUSE_FACTOR: u32 = 20;

/// Inspects the file until the result is dropped.
pub(super) fn start(queue: &Arc<Queue>, unsettled: &Arc<Unsettled>) -> AbortOnDropHandle<()> {
    let monitor = monitor(Arc::downgrade(queue), Arc::clone(unsettled));
    AbortOnDropHandle::new(tokio::spawn(monitor))
}

async fn monitor(queue: Weak<Queue>, unsettled: Arc<Unsettled>) {
    let gauges = Gauges::new();
    let mut inspector = None;
    loop {
        let Some(path) = queue.upgrade().map(|queue| queue.path.clone()) else { return };
        let started = Instant::now();
        let inspected = async {
            let inspector = match inspector.take() {
                Some(inspector) => inspector,
                None => Inspector::open(&path).await?,
            };
            let (depths, oldest) = (inspector.depths().await?, inspector.oldest_at().await?);
            Ok::<_, InspectError>((inspector, depths, oldest))
        };
        match inspected.await {
            Ok((opened, depths, oldest)) => {
                inspector = Some(opened);
                // The file's count of ready messages includes those in flight.
                let count = unsettled.count();
                let ready = depths.ready.saturating_sub(count as u64);
                gauges.set(Depths { ready, ..depths }, count, oldest);
            }
            Err(error) => {
                tracing::debug!(%error, "cannot inspect the queue; its metrics are out of date");
            }
        }
        sleep(INTERVAL.max(started.elapsed() * PAUSE_FACTOR)).await;
    }
}
