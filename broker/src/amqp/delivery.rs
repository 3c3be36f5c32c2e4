//! A message as received from a RabbitMQ, and how it is settled there.

use std::time::Duration;

use lapin::options::BasicAckOptions;
use lapin::{Acker, BasicProperties, message};
use tokio::time::timeout;

use super::history;
use super::publisher::{Outgoing, Publisher};
use crate::message::{DecodeError, decode};
use crate::{Disposition, Settled, backoff, retry};

/// A copy that is not confirmed in this time is published again.
const COPY_TIMEOUT: Duration = Duration::from_secs(5);
const ACK_TIMEOUT: Duration = Duration::from_secs(15);

/// See [`crate::Delivery`].
pub(crate) struct Delivery {
    id: Result<i64, DecodeError>,
    body: Vec<u8>,
    properties: BasicProperties,
    attempts: u32,
    redelivered: bool,
    acker: Acker,
    publisher: Publisher,
}

impl Delivery {
    pub(super) fn new(received: message::Delivery, publisher: Publisher) -> Self {
        let message::Delivery { data: body, properties, redelivered, acker, .. } = received;
        let id = decode(&body);
        let attempts = history::failed_attempts(&properties);
        Self { id, body, properties, attempts, redelivered, acker, publisher }
    }

    pub(crate) fn id(&self) -> Result<i64, &DecodeError> {
        self.id.as_ref().copied()
    }

    pub(crate) fn callback_id(&self) -> &str {
        self.properties.correlation_id().as_ref().map_or("", |id| id.as_str())
    }

    pub(crate) fn failed_attempts(&self) -> u32 {
        self.attempts
    }

    pub(crate) fn redelivered(&self) -> bool {
        self.redelivered
    }

    /// For all but an ack that means a copy, confirmed before the original is acked.
    pub(crate) async fn settle(self, disposition: Disposition) -> Settled {
        let copy = match disposition {
            Disposition::Ack => None,
            Disposition::Retry { reason, after } => {
                let wait = retry::wait(self.attempts + 1, after, rand::random());
                let expiration = wait.length.as_millis().to_string();
                Some(Outgoing {
                    routing_key: self.publisher.topology().delays[wait.level].clone(),
                    body: self.body.clone(),
                    properties: history::after_failure(&self.properties, &reason)
                        .with_expiration(expiration.into()),
                })
            }
            Disposition::Requeue => Some(Outgoing {
                routing_key: self.publisher.topology().queue.clone(),
                body: self.body.clone(),
                properties: history::kept(&self.properties),
            }),
            Disposition::DeadLetter { reason } => Some(Outgoing {
                routing_key: self.publisher.topology().dead.clone(),
                body: self.body.clone(),
                properties: history::after_failure(&self.properties, &reason),
            }),
        };
        if let Some(copy) = copy
            && self.publish_copy(copy).await == Settled::Lost
        {
            return Settled::Lost;
        }
        match timeout(ACK_TIMEOUT, self.acker.ack(BasicAckOptions::default())).await {
            Ok(Ok(true)) => Settled::Done,
            // `Ok(false)` is lapin's word for an ack that was never sent.
            Ok(Ok(false) | Err(_)) | Err(_) => Settled::Lost,
        }
    }

    async fn publish_copy(&self, copy: Outgoing) -> Settled {
        for wait in backoff() {
            // First, or each message of a lost channel would be there twice: its copy and itself.
            if !self.acker.usable() {
                return Settled::Lost;
            }
            match self.publisher.publish(std::iter::once(copy.clone()), COPY_TIMEOUT).await {
                Ok(()) => return Settled::Done,
                Err(error) => tracing::debug!(%error, "the copy is not confirmed; trying again"),
            }
            tokio::time::sleep(wait).await;
        }
        Settled::Lost
    }
}
