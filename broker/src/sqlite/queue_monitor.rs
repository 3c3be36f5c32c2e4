//! A look at the file every few seconds, for the metrics, by a connection of its own: counting reads
//! all of a long queue, and must not hold up those who write.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::consumer::Unsettled;
use super::inspector::Inspector;
use super::queue::Queue;
use crate::gauges::Gauges;
use crate::{Depths, InspectError};

const INTERVAL: Duration = Duration::from_secs(2);
/// Counting takes at most this share of the time: a long queue is counted less often.
const SHARE: u32 = 20;

/// Looks until it is dropped.
pub(super) struct Look(JoinHandle<()>);

impl Look {
    pub(super) fn start(queue: &Arc<Queue>, unsettled: &Arc<Unsettled>) -> Self {
        Self(tokio::spawn(look(Arc::downgrade(queue), Arc::clone(unsettled))))
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn look(queue: Weak<Queue>, unsettled: Arc<Unsettled>) {
    let gauges = Gauges::new();
    let mut inspector = None;
    loop {
        let Some(path) = queue.upgrade().map(|queue| queue.path().to_owned()) else { return };
        let began = Instant::now();
        let looked = async {
            let inspector = match inspector.take() {
                Some(inspector) => inspector,
                None => Inspector::open(&path).await?,
            };
            let (depths, oldest) = (inspector.depths().await?, inspector.oldest_at().await?);
            Ok::<_, InspectError>((inspector, depths, oldest))
        };
        match looked.await {
            Ok((opened, depths, oldest)) => {
                inspector = Some(opened);
                // Those in flight are in the file as well.
                let count = unsettled.count();
                let ready = depths.ready.saturating_sub(count as u64);
                gauges.set(Depths { ready, ..depths }, count, oldest);
            }
            Err(error) => tracing::debug!(%error, "cannot look at the queue"),
        }
        sleep(INTERVAL.max(began.elapsed() * SHARE)).await;
    }
}
