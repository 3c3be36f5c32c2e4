//! Receives deliveries from a queue in a file.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use runtime::Status;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use super::delivery::Delivery;
use super::queue::{Message, Queue};
use super::queue_monitor;
use super::unsettled::Unsettled;

/// How often an idle consumer polls the file, for delayed messages that are due and for dead
/// letters that another process has redriven.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How many messages are prefetched into memory at most.
const BUFFER_MAX: u16 = 256;

/// See [`crate::queue::Consumer`].
pub(crate) struct Consumer {
    queue: Arc<Queue>,
    prefetch: usize,
    /// Taken from the file and not returned to the caller yet.
    buffer: VecDeque<Message>,
    unsettled: Arc<Unsettled>,
    /// Whether the last read of the file failed, which is logged once.
    is_failing: bool,
    _monitor: AbortOnDropHandle<()>,
}

impl Consumer {
    pub(crate) fn new(queue: &Arc<Queue>, prefetch: u16) -> Self {
        let unsettled = Arc::default();
        Self {
            _monitor: queue_monitor::start(queue, &unsettled),
            queue: Arc::clone(queue),
            prefetch: at_least_one(prefetch),
            buffer: VecDeque::new(),
            unsettled,
            is_failing: false,
        }
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.queue.file.status()
    }

    pub(crate) async fn next(&mut self) -> Delivery {
        loop {
            if let Some(message) = self.buffer.pop_front() {
                let delivery = Delivery::new(&message, &self.queue, &self.unsettled);
                self.unsettled.add(message);
                return delivery;
            }
            let in_flight = self.unsettled.count();
            let free = u16::try_from(self.prefetch.saturating_sub(in_flight)).unwrap_or(BUFFER_MAX);
            if free == 0 {
                self.unsettled.settled().await;
                continue;
            }
            // Enable the notification before reading, so that a message which arrives in between is
            // not missed.
            let queue = Arc::clone(&self.queue);
            let mut arrived = std::pin::pin!(queue.arrived.notified());
            arrived.as_mut().enable();
            let taken = self.queue.take(free.min(BUFFER_MAX)).await;
            let was_failing = std::mem::replace(&mut self.is_failing, taken.is_err());
            match taken {
                Ok(messages) if !messages.is_empty() => self.buffer = messages,
                Ok(_) => _ = timeout(POLL_INTERVAL, arrived).await,
                Err(error) => {
                    if !was_failing {
                        tracing::warn!(%error, "cannot read the queue; trying again");
                    }
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        }
    }

    pub(crate) fn set_prefetch(&mut self, prefetch: u16) {
        if at_least_one(prefetch) < std::mem::replace(&mut self.prefetch, at_least_one(prefetch)) {
            self.stop();
        }
    }

    /// Gives the buffered messages back to the queue.
    pub(crate) fn stop(&mut self) {
        self.queue.give_back(std::mem::take(&mut self.buffer));
    }
}

/// With a prefetch of 0, no message would ever be delivered.
fn at_least_one(prefetch: u16) -> usize {
    prefetch.max(1).into()
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.stop();
        self.unsettled.close(&self.queue);
    }
}
