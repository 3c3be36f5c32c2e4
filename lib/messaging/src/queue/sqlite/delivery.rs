//! A delivery from a queue in a file and its settlement.

use std::sync::Arc;

use super::queue::{Message, Queue, time_from_milliseconds};
use super::unsettled::Unsettled;
use crate::amqp::backoff;
use crate::queue::delivery::Details;
use crate::queue::disposition::{Disposition, Settled};
use crate::queue::message;
use crate::queue::origin::Origin;

/// See [`crate::queue::Delivery`].
pub(crate) struct Delivery {
    pub(crate) details: Details,
    seq: i64,
    queue: Arc<Queue>,
    unsettled: Arc<Unsettled>,
}

impl Delivery {
    pub(super) fn new(message: &Message, queue: &Arc<Queue>, unsettled: &Arc<Unsettled>) -> Self {
        let Origin { callback_id, traceparent } = Origin::from_text(&message.origin);
        let details = Details {
            id: Ok(message.object_id),
            callback_id: callback_id.to_owned(),
            traceparent: traceparent.map(str::to_owned),
            accepted_at: message::accepted_at(callback_id)
                .or_else(|| time_from_milliseconds(message.published_at)),
            failed_attempts: message.attempts,
            redelivered: message.redelivered,
        };
        let (queue, unsettled) = (Arc::clone(queue), Arc::clone(unsettled));
        Self { details, seq: message.seq, queue, unsettled }
    }

    /// Retries while the file cannot be written, for example because the disk is full. Meanwhile
    /// the message counts towards the prefetch.
    pub(crate) async fn settle(self, disposition: Disposition) -> Settled {
        let Self { details: Details { failed_attempts, .. }, seq, queue, unsettled } = self;
        let Some(message) = unsettled.start_settling(seq) else { return Settled::Lost };
        let mut settling = Settling { message: Some(message), queue, unsettled };
        for delay in backoff() {
            match settling.queue.settle(seq, failed_attempts, disposition.clone()).await {
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
        if let Some(message) = self.unsettled.start_settling(self.seq) {
            self.queue.give_back([message]);
            self.unsettled.finish_settling(self.seq);
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
