//! A delivery from RabbitMQ and its settlement.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lapin::options::BasicNackOptions;
use lapin::types::ShortString;
use lapin::{Acker, BasicProperties, Channel, message};
use tokio::time::timeout;

use super::ack_batcher::AckBatcher;
use super::history;
use super::publisher::{Outgoing, Publisher};
use super::unsettled::{Unsettled, UnsettledGuard};
use crate::amqp::{Connection, backoff};
use crate::queue::delivery::Details;
use crate::queue::disposition::{Disposition, Settled};
use crate::queue::message::decode;
use crate::queue::retry;

/// A copy that is not confirmed within this time is published again.
const COPY_TIMEOUT: Duration = Duration::from_secs(5);
const ACK_TIMEOUT: Duration = Duration::from_secs(15);
pub(super) const REQUEUE: BasicNackOptions = BasicNackOptions { requeue: true, multiple: false };

/// What the deliveries of one session need to be settled.
pub(super) struct SettlementContext {
    pub(super) publisher: Publisher,
    pub(super) acks: AckBatcher,
    pub(super) unsettled: Arc<Unsettled>,
    /// The channel of the deliveries and its connection, if both must outlive the session.
    pub(super) kept_channel: OnceLock<(Channel, Arc<Connection>)>,
}

/// See [`crate::queue::Delivery`].
pub(crate) struct Delivery {
    pub(crate) details: Details,
    body: Vec<u8>,
    properties: BasicProperties,
    tag: u64,
    acker: Acker,
    settlement: Arc<SettlementContext>,
    /// Counts the delivery as unsettled until it is settled or dropped.
    _guard: UnsettledGuard,
}

impl Delivery {
    pub(super) fn new(received: message::Delivery, settlement: Arc<SettlementContext>) -> Self {
        let message::Delivery {
            data: body, properties, redelivered, delivery_tag: tag, acker, ..
        } = received;
        let details = Details {
            id: decode(&body),
            callback_id: history::callback_id(&properties),
            traceparent: history::traceparent(&properties).map(str::to_owned),
            accepted_at: history::accepted_at(&properties),
            failed_attempts: history::failed_attempts(&properties),
            redelivered,
        };
        let guard = settlement.unsettled.track(tag, details.accepted_at);
        Self { details, body, properties, tag, acker, settlement, _guard: guard }
    }

    pub(crate) fn is_lost(&self) -> bool {
        !self.acker.usable()
    }

    /// Every disposition but an ack publishes a copy, which is confirmed before the original is
    /// acked.
    pub(crate) async fn settle(self, disposition: Disposition) -> Settled {
        let topology = &self.settlement.publisher.topology;
        if matches!(disposition, Disposition::DeadLetter { .. }) {
            // Record the letter before it reaches the dead-letter queue, because an inspection may
            // count it there at once.
            self.settlement.publisher.expiry.record_own();
        }
        let copy = match disposition {
            Disposition::Ack => None,
            Disposition::Retry { reason, after } => {
                let failures = self.details.failed_attempts.saturating_add(1);
                let delay = retry::delay(failures, after, rand::random());
                let expiration = delay.length.as_millis().to_string();
                let properties = history::after_failure(&self.properties, &reason);
                Some((&topology.delays[delay.level], properties.with_expiration(expiration.into())))
            }
            Disposition::Requeue => {
                Some((topology.queue_of_body(&self.body), history::requeued(&self.properties)))
            }
            Disposition::DeadLetter { reason } => {
                Some((&topology.dead, history::after_failure(&self.properties, &reason)))
            }
        };
        // In a box, so that the futures of acks, which are most settlements, stay small.
        if let Some((queue, properties)) = copy
            && Box::pin(self.publish_copy(queue, properties)).await == Settled::Lost
        {
            return Settled::Lost;
        }
        match timeout(ACK_TIMEOUT, self.settlement.acks.send(self.tag, self.acker)).await {
            Ok(true) => Settled::Done,
            Ok(false) | Err(_) => Settled::Lost,
        }
    }

    pub(crate) async fn give_back(self) {
        // If this fails, the broker requeues the delivery when the channel is closed.
        if !matches!(timeout(ACK_TIMEOUT, self.acker.nack(REQUEUE)).await, Ok(Ok(true))) {
            tracing::debug!(
                "cannot requeue a delivery now; the broker requeues it when the channel is closed"
            );
        }
    }

    async fn publish_copy(&self, queue: &ShortString, properties: BasicProperties) -> Settled {
        let copy = Outgoing { queue: queue.clone(), body: self.body.clone(), properties };
        for wait in backoff() {
            // Check first: the broker redelivers each message of a lost channel, so a copy would be
            // a duplicate.
            if self.is_lost() {
                return Settled::Lost;
            }
            let copies = std::iter::once(copy.clone());
            match self.settlement.publisher.publish(copies, COPY_TIMEOUT).await {
                Ok(()) => return Settled::Done,
                Err(error) => tracing::debug!(%error, "cannot publish the copy; trying again"),
            }
            tokio::time::sleep(wait).await;
        }
        Settled::Lost
    }
}
