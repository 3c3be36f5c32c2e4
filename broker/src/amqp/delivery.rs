//! A delivery from RabbitMQ and its settlement.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use lapin::options::BasicNackOptions;
use lapin::types::ShortString;
use lapin::{Acker, BasicProperties, Channel, message};
use tokio::time::timeout;

use super::ack_batcher::AckBatcher;
use super::history;
use super::link::Link;
use super::publisher::{Outgoing, Publisher};
use super::unsettled::{Held, Unsettled};
use crate::message::{DecodeError, decode};
use crate::{Disposition, Settled, backoff, retry};

/// A copy that is not confirmed within this time is published again.
const COPY_TIMEOUT: Duration = Duration::from_secs(5);
const ACK_TIMEOUT: Duration = Duration::from_secs(15);
pub(super) const REQUEUE: BasicNackOptions = BasicNackOptions { requeue: true, multiple: false };

/// What the deliveries of one session need to be settled.
pub(super) struct SettlementContext {
    pub(super) publisher: Publisher,
    pub(super) acks: AckBatcher,
    pub(super) unsettled: Arc<Unsettled>,
    /// The channel that delivered them, and its connection, if both must outlive the session.
    pub(super) kept_channel: OnceLock<(Channel, Arc<Link>)>,
}

/// See [`crate::Delivery`].
pub(crate) struct Delivery {
    id: Result<i64, DecodeError>,
    body: Vec<u8>,
    properties: BasicProperties,
    accepted_at: Option<SystemTime>,
    attempts: u32,
    redelivered: bool,
    tag: u64,
    acker: Acker,
    settlement: Arc<SettlementContext>,
    /// Counts the delivery as unsettled until it is settled or dropped.
    _held: Held,
}

impl Delivery {
    pub(super) fn new(received: message::Delivery, settlement: Arc<SettlementContext>) -> Self {
        let message::Delivery { data: body, properties, redelivered, delivery_tag, acker, .. } =
            received;
        let id = decode(&body);
        let accepted_at = history::accepted_at(&properties);
        let attempts = history::failed_attempts(&properties);
        let held = settlement.unsettled.hold(delivery_tag, accepted_at);
        Self {
            id,
            body,
            properties,
            accepted_at,
            attempts,
            redelivered,
            tag: delivery_tag,
            acker,
            settlement,
            _held: held,
        }
    }

    pub(crate) fn id(&self) -> Result<i64, &DecodeError> {
        self.id.as_ref().copied()
    }

    pub(crate) fn callback_id(&self) -> &str {
        self.properties.correlation_id().as_ref().map_or("", |id| id.as_str())
    }

    pub(crate) fn traceparent(&self) -> Option<&str> {
        history::traceparent(&self.properties)
    }

    pub(crate) fn accepted_at(&self) -> Option<SystemTime> {
        self.accepted_at
    }

    pub(crate) fn failed_attempts(&self) -> u32 {
        self.attempts
    }

    pub(crate) fn redelivered(&self) -> bool {
        self.redelivered
    }

    pub(crate) fn is_lost(&self) -> bool {
        !self.acker.usable()
    }

    /// Every disposition but an ack publishes a copy, which is confirmed before the original is
    /// acked.
    pub(crate) async fn settle(self, disposition: Disposition) -> Settled {
        let topology = self.settlement.publisher.topology();
        if matches!(disposition, Disposition::DeadLetter { .. }) {
            // Before the letter can be counted in its queue.
            self.settlement.publisher.expiry().note_own();
        }
        let copy = match disposition {
            Disposition::Ack => None,
            Disposition::Retry { reason, after } => {
                let delay = retry::delay(self.attempts.saturating_add(1), after, rand::random());
                let expiration = delay.length.as_millis().to_string();
                let properties = history::after_failure(&self.properties, &reason);
                Some((&topology.delays[delay.level], properties.with_expiration(expiration.into())))
            }
            Disposition::Requeue => Some((&topology.queue, history::requeued(&self.properties))),
            Disposition::DeadLetter { reason } => {
                Some((&topology.dead, history::after_failure(&self.properties, &reason)))
            }
        };
        if let Some((queue, properties)) = copy
            && self.publish_copy(queue, properties).await == Settled::Lost
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
        let copy = Outgoing { body: self.body.clone(), properties };
        for wait in backoff() {
            // Check first: the broker redelivers each message of a lost channel, so a copy would
            // duplicate it.
            if self.is_lost() {
                return Settled::Lost;
            }
            match self
                .settlement
                .publisher
                .publish(queue, std::iter::once(copy.clone()), COPY_TIMEOUT)
                .await
            {
                Ok(()) => return Settled::Done,
                Err(error) => {
                    tracing::debug!(%error, "cannot publish the copy; trying again");
                }
            }
            tokio::time::sleep(wait).await;
        }
        Settled::Lost
    }
}
