//! A message as taken from a file, and how it is settled there.

use std::sync::Arc;
use std::time::SystemTime;

use super::consumer::Unsettled;
use super::queue::{Message, Queue, moment};
use crate::{Disposition, Origin, Settled, backoff, message};

/// See [`crate::Delivery`].
pub(crate) struct Delivery {
    message: Message,
    queue: Arc<Queue>,
    unsettled: Arc<Unsettled>,
}

impl Delivery {
    pub(super) fn new(message: Message, queue: &Arc<Queue>, unsettled: &Arc<Unsettled>) -> Self {
        Self { message, queue: Arc::clone(queue), unsettled: Arc::clone(unsettled) }
    }

    pub(crate) fn id(&self) -> i64 {
        self.message.object_id
    }

    pub(crate) fn callback_id(&self) -> &str {
        self.origin().callback_id
    }

    pub(crate) fn traceparent(&self) -> Option<&str> {
        self.origin().traceparent
    }

    pub(crate) fn accepted_at(&self) -> Option<SystemTime> {
        let by_id = message::accepted_at(self.callback_id());
        by_id.or_else(|| moment(self.message.published_at))
    }

    fn origin(&self) -> Origin<'_> {
        Origin::from_text(&self.message.origin)
    }

    pub(crate) fn failed_attempts(&self) -> u32 {
        self.message.attempts
    }

    pub(crate) fn redelivered(&self) -> bool {
        self.message.redelivered
    }

    /// While the file cannot be written, as when the disk is full, it is tried again: the message
    /// has had its effect, and keeps its place in the prefetch meanwhile.
    pub(crate) async fn settle(self, disposition: Disposition) -> Settled {
        let Self { message: Message { seq, attempts, .. }, queue, unsettled } = self;
        let Some(message) = unsettled.begin_to_settle(seq) else { return Settled::Lost };
        let mut settling = Settling { message: Some(message), queue, unsettled };
        for wait in backoff() {
            match settling.queue.settle(seq, attempts, disposition.clone()).await {
                Ok(()) => {
                    settling.message = None;
                    settling.unsettled.settled(seq);
                    return Settled::Done;
                }
                Err(error) => tracing::debug!(%error, "not settled; trying again"),
            }
            tokio::time::sleep(wait).await;
        }
        Settled::Lost
    }

    pub(crate) fn give_back(self) {
        let seq = self.message.seq;
        if let Some(message) = self.unsettled.begin_to_settle(seq) {
            self.queue.give_back([message]);
            self.unsettled.settled(seq);
        }
    }
}

/// A message that is being settled. When that is broken off, the message stays in flight.
struct Settling {
    message: Option<Message>,
    queue: Arc<Queue>,
    unsettled: Arc<Unsettled>,
}

impl Drop for Settling {
    fn drop(&mut self) {
        if let Some(message) = self.message.take() {
            self.unsettled.break_off(message, &self.queue);
        }
    }
}
