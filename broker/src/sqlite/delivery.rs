//! A delivery from a queue in a file and its settlement.

use std::sync::Arc;
use std::time::SystemTime;

use super::consumer::Unsettled;
use super::queue::{Message, Queue, time_from_milliseconds};
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
        let from_id = message::accepted_at(self.callback_id());
        from_id.or_else(|| time_from_milliseconds(self.message.published_at))
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

    /// Retries while the file cannot be written, for example because the disk is full. Meanwhile
    /// the message counts towards the prefetch.
    pub(crate) async fn settle(self, disposition: Disposition) -> Settled {
        let Self { message: Message { seq, attempts, .. }, queue, unsettled } = self;
        let Some(message) = unsettled.start_settling(seq) else { return Settled::Lost };
        let mut settling = Settling { message: Some(message), queue, unsettled };
        for delay in backoff() {
            match settling.queue.settle(seq, attempts, disposition.clone()).await {
                Ok(()) => {
                    settling.message = None;
                    settling.unsettled.finish_settling(seq);
                    return Settled::Done;
                }
                Err(error) => tracing::debug!(%error, "cannot settle a delivery; trying again"),
            }
            tokio::time::sleep(delay).await;
        }
        Settled::Lost
    }

    pub(crate) fn give_back(self) {
        let seq = self.message.seq;
        if let Some(message) = self.unsettled.start_settling(seq) {
            self.queue.give_back([message]);
            self.unsettled.finish_settling(seq);
        }
    }
}

/// A message that is being settled. Dropping this cancels the settlement, and the message stays in
/// flight.
struct Settling {
    message: Option<Message>,
    queue: Arc<Queue>,
    unsettled: Arc<Unsettled>,
}

impl Drop for Settling {
    fn drop(&mut self) {
        if let Some(message) = self.message.take() {
            self.unsettled.cancel_settling(message, &self.queue);
        }
    }
}
