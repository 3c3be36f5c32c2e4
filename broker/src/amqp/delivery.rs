//! A message as received from a RabbitMQ, and how it is settled there.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use lapin::options::BasicNackOptions;
use lapin::types::ShortString;
use lapin::{Acker, BasicProperties, Channel, message};
use tokio::time::timeout;

use super::ack_batcher::Acks;
use super::history;
use super::link::Link;
use super::publisher::{Outgoing, Publisher};
use super::unsettled::{Held, Unsettled};
use crate::message::{DecodeError, decode};
use crate::{Disposition, Settled, backoff, retry};

/// A copy that is not confirmed in this time is published again.
const COPY_TIMEOUT: Duration = Duration::from_secs(5);
const ACK_TIMEOUT: Duration = Duration::from_secs(15);
pub(super) const REQUEUE: BasicNackOptions = BasicNackOptions { requeue: true, multiple: false };

/// What the deliveries of one session are settled by.
pub(super) struct Outward {
    pub(super) publisher: Publisher,
    pub(super) acks: Acks,
    pub(super) unsettled: Arc<Unsettled>,
    /// The channel that they came by, and its connection, if they are to outlive their session.
    pub(super) kept: OnceLock<(Channel, Arc<Link>)>,
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
    outward: Arc<Outward>,
    /// Counts it until it is settled or dropped.
    _held: Held,
}

impl Delivery {
    pub(super) fn new(received: message::Delivery, outward: Arc<Outward>) -> Self {
        let message::Delivery { data: body, properties, redelivered, delivery_tag, acker, .. } =
            received;
        let id = decode(&body);
        let accepted_at = history::accepted_at(&properties);
        let attempts = history::failed_attempts(&properties);
        let held = outward.unsettled.hold(delivery_tag, accepted_at);
        Self {
            id,
            body,
            properties,
            accepted_at,
            attempts,
            redelivered,
            tag: delivery_tag,
            acker,
            outward,
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

    /// For all but an ack that means a copy, confirmed before the original is acked.
    pub(crate) async fn settle(self, disposition: Disposition) -> Settled {
        let topology = self.outward.publisher.topology();
        if matches!(disposition, Disposition::DeadLetter { .. }) {
            // Before it can be counted in the queue.
            self.outward.publisher.expiry().note_own();
        }
        let copy = match disposition {
            Disposition::Ack => None,
            Disposition::Retry { reason, after } => {
                let wait = retry::wait(self.attempts.saturating_add(1), after, rand::random());
                let expiration = wait.length.as_millis().to_string();
                let properties = history::after_failure(&self.properties, &reason);
                Some((&topology.delays[wait.level], properties.with_expiration(expiration.into())))
            }
            Disposition::Requeue => Some((&topology.queue, history::kept(&self.properties))),
            Disposition::DeadLetter { reason } => {
                Some((&topology.dead, history::after_failure(&self.properties, &reason)))
            }
        };
        if let Some((queue, properties)) = copy
            && self.publish_copy(queue, properties).await == Settled::Lost
        {
            return Settled::Lost;
        }
        match timeout(ACK_TIMEOUT, self.outward.acks.send(self.tag, self.acker)).await {
            Ok(true) => Settled::Done,
            Ok(false) | Err(_) => Settled::Lost,
        }
    }

    pub(crate) async fn give_back(self) {
        // Else it goes back with its channel.
        if !matches!(timeout(ACK_TIMEOUT, self.acker.nack(REQUEUE)).await, Ok(Ok(true))) {
            tracing::debug!("not given back");
        }
    }

    async fn publish_copy(&self, queue: &ShortString, properties: BasicProperties) -> Settled {
        let copy = Outgoing { body: self.body.clone(), properties };
        for wait in backoff() {
            // First, or each message of a lost channel would be there twice: its copy and itself.
            if self.is_lost() {
                return Settled::Lost;
            }
            match self
                .outward
                .publisher
                .publish(queue, std::iter::once(copy.clone()), COPY_TIMEOUT)
                .await
            {
                Ok(()) => return Settled::Done,
                Err(error) => tracing::debug!(%error, "the copy is not confirmed; trying again"),
            }
            tokio::time::sleep(wait).await;
        }
        Settled::Lost
    }
}
