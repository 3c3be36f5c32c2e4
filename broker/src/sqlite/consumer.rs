//! Taking messages from a file.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::delivery::Delivery;
use super::queue::{Message, Queue};
use super::queue_monitor::Look;
use crate::LinkStatus;

/// How often an idle consumer looks without having been told: for delayed messages that are due, and
/// for dead letters that another process has sent back.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How many messages are taken ahead at most.
const AHEAD_MAX: u16 = 256;

/// See [`crate::Consumer`].
pub(crate) struct Consumer {
    queue: Arc<Queue>,
    prefetch: usize,
    /// Taken and not handed out.
    ahead: VecDeque<Message>,
    unsettled: Arc<Unsettled>,
    /// Whether messages could not be taken the last time, which is said once.
    failing: bool,
    _look: Look,
}

/// What a consumer has handed out and what has not been settled yet.
#[derive(Default)]
pub(super) struct Unsettled {
    messages: Mutex<Messages>,
    settled: Notify,
}

#[derive(Default)]
struct Messages {
    /// By their numbers; `None` while one is being settled, when it is no longer given back.
    in_flight: BTreeMap<i64, Option<Message>>,
    closed: bool,
}

impl Unsettled {
    /// Takes the message to settle it; `None` if it has been given back.
    pub(super) fn begin_to_settle(&self, seq: i64) -> Option<Message> {
        self.messages().in_flight.get_mut(&seq)?.take()
    }

    /// Settling it was broken off: it is in flight as before, or given back like all of a consumer
    /// that was closed meanwhile.
    pub(super) fn break_off(&self, message: Message, queue: &Queue) {
        let mut messages = self.messages();
        if messages.closed {
            queue.give_back([message]);
        } else {
            messages.in_flight.insert(message.seq, Some(message));
        }
    }

    /// The message is settled: there is room for another.
    pub(super) fn settled(&self, seq: i64) {
        self.messages().in_flight.remove(&seq);
        self.settled.notify_one();
    }

    /// How many there are.
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
            _look: Look::start(queue, &unsettled),
            queue: Arc::clone(queue),
            prefetch: least(prefetch),
            ahead: VecDeque::new(),
            unsettled,
            failing: false,
        }
    }

    pub(crate) fn status(&self) -> watch::Receiver<LinkStatus> {
        self.queue.status()
    }

    pub(crate) async fn next(&mut self) -> Delivery {
        loop {
            if let Some(message) = self.ahead.pop_front() {
                self.unsettled.messages().in_flight.insert(message.seq, Some(message.clone()));
                return Delivery::new(message, &self.queue, &self.unsettled);
            }
            let in_flight = self.unsettled.count();
            let room = u16::try_from(self.prefetch.saturating_sub(in_flight)).unwrap_or(AHEAD_MAX);
            if room == 0 {
                self.unsettled.settled.notified().await;
                continue;
            }
            // Before looking, so that what arrives in between is not missed.
            let queue = Arc::clone(&self.queue);
            let mut arrived = std::pin::pin!(queue.arrived.notified());
            arrived.as_mut().enable();
            let taken = self.queue.take(room.min(AHEAD_MAX)).await;
            let was_failing = std::mem::replace(&mut self.failing, taken.is_err());
            match taken {
                Ok(messages) if !messages.is_empty() => self.ahead = messages,
                Ok(_) => _ = timeout(POLL_INTERVAL, arrived).await,
                Err(error) => {
                    if !was_failing {
                        tracing::warn!(%error, "cannot take messages; trying again");
                    }
                    tokio::time::sleep(POLL_INTERVAL).await;
                }
            }
        }
    }

    pub(crate) fn set_prefetch(&mut self, prefetch: u16) {
        if least(prefetch) < std::mem::replace(&mut self.prefetch, least(prefetch)) {
            self.stop();
        }
    }

    /// Gives back what was taken ahead.
    pub(crate) fn stop(&mut self) {
        self.queue.give_back(std::mem::take(&mut self.ahead));
    }
}

/// Without any, nothing would ever be taken.
fn least(prefetch: u16) -> usize {
    prefetch.max(1).into()
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.stop();
        let mut messages = self.unsettled.messages();
        messages.closed = true;
        self.queue.give_back(std::mem::take(&mut messages.in_flight).into_values().flatten());
    }
}
