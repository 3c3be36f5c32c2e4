//! The deliveries of a consumer that are not settled yet.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::queue::{Message, Queue};

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
    /// Adds a message that is delivered now.
    pub(super) fn add(&self, message: Message) {
        self.messages.lock().in_flight.insert(message.seq, Some(message));
    }

    /// Takes the message in order to settle it; `None` if it has been given back.
    pub(super) fn start_settling(&self, seq: i64) -> Option<Message> {
        self.messages.lock().in_flight.get_mut(&seq)?.take()
    }

    /// Cancels settling a message: it is in flight again, or given back to the queue if the
    /// consumer was closed meanwhile.
    pub(super) fn cancel_settling(&self, message: Message, queue: &Queue) {
        let mut messages = self.messages.lock();
        if messages.is_closed {
            queue.give_back([message]);
        } else {
            messages.in_flight.insert(message.seq, Some(message));
        }
    }

    /// Records that the message is settled, so that another one can be delivered.
    pub(super) fn finish_settling(&self, seq: i64) {
        self.messages.lock().in_flight.remove(&seq);
        self.settled.notify_one();
    }

    /// Waits until a delivery is settled.
    pub(super) async fn settled(&self) {
        self.settled.notified().await;
    }

    /// Gives all messages back to the queue, except those that are being settled.
    pub(super) fn close(&self, queue: &Queue) {
        let mut messages = self.messages.lock();
        messages.is_closed = true;
        queue.give_back(std::mem::take(&mut messages.in_flight).into_values().flatten());
    }

    pub(super) fn count(&self) -> usize {
        self.messages.lock().in_flight.len()
    }
}
