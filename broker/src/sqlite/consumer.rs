//! Receives deliveries from a queue in a file.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::delivery::Delivery;
use super::queue::{Message, Queue};
use super::queue_monitor::QueueMonitor;
use crate::LinkStatus;

/// How often an idle consumer polls the file, for delayed messages that are due and for dead
/// letters that another process has redriven.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How many messages are prefetched into memory at most.
const BUFFER_MAX: u16 = 256;

/// See [`crate::Consumer`].
pub(crate) struct Consumer {
    queue: Arc<Queue>,
    prefetch: usize,
    /// Taken from the file and not returned to the caller yet.
    buffer: VecDeque<Message>,
    unsettled: Arc<Unsettled>,
    /// Whether the last read of the file failed, which is logged once.
    is_failing: bool,
    _monitor: QueueMonitor,
}

/// The unsettled deliveries of a consumer.
#[derive(Default)]
pub(super) struct Unsettled {
    messages: Mutex<Messages>,
    settled: Notify,
}

#[derive(Default)]
struct Messages {
    /// By sequence number; `None` while a message is being settled, and therefore not given back.
    in_flight: BTreeMap<i64, Option<Message>>,
    is_closed: bool,
}

impl Unsettled {
    /// Takes the message in order to settle it; `None` if it has been given back.
    pub(super) fn start_settling(&self, seq: i64) -> Option<Message> {
        self.messages().in_flight.get_mut(&seq)?.take()
    }

    /// Cancels settling a message: it is in flight again, or given back to the queue if the
    /// consumer was closed meanwhile.
    pub(super) fn cancel_settling(&self, message: Message, queue: &Queue) {
        let mut messages = self.messages();
        if messages.is_closed {
            queue.give_back([message]);
        } else {
            messages.in_flight.insert(message.seq, Some(message));
        }
    }

    /// Records that the message is settled, so that another one can be delivered.
    pub(super) fn finish_settling(&self, seq: i64) {
        self.messages().in_flight.remove(&seq);
        self.settled.notify_one();
    }

    /// The number of unsettled deliveries.
    pub(super) fn count(&self) -> usize {
        self.messages().in_flight.len()
    }

    fn messages(&self) -> MutexGuard<'_, Messages> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Consumer {
    pub(crate) fn new(queue: &Arc<Queue>, prefetch: u16) -> Self {
        let unsettled = Arc::default();
        Self {
            _monitor: QueueMonitor::start(queue, &unsettled),
            queue: Arc::clone(queue),
            prefetch: at_least_one(prefetch),
            buffer: VecDeque::new(),
            unsettled,
            is_failing: false,
        }
    }

    pub(crate) fn status(&self) -> watch::Receiver<LinkStatus> {
        self.queue.status()
    }

    pub(crate) async fn next(&mut self) -> Delivery {
        loop {
            if let Some(message) = self.buffer.pop_front() {
                self.unsettled.messages().in_flight.insert(message.seq, Some(message.clone()));
                return Delivery::new(message, &self.queue, &self.unsettled);
            }
            let in_flight = self.unsettled.count();
            let free = u16::try_from(self.prefetch.saturating_sub(in_flight)).unwrap_or(BUFFER_MAX);
            if free == 0 {
                self.unsettled.settled.notified().await;
                continue;
            }
            // Enable the notification before reading, so that no message in between is missed.
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
        let mut messages = self.unsettled.messages();
        messages.is_closed = true;
        self.queue.give_back(std::mem::take(&mut messages.in_flight).into_values().flatten());
    }
}
