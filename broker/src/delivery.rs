//! A message as received, and the ways to settle it.

use std::time::{Duration, SystemTime};

use lapin::options::BasicAckOptions;
use lapin::types::{AMQPValue, FieldTable};
use lapin::{Acker, BasicProperties, message};
use tokio::time::timeout;

use crate::link;
use crate::message::{DecodeError, decode};
use crate::publisher::{Outgoing, Publisher};
use crate::retry;

/// How many attempts have failed so far.
const ATTEMPTS: &str = "lastseen-attempts";
/// Why the last of them failed.
const REASON: &str = "lastseen-reason";
/// When the first and the last failed, in RFC 3339, for the person who reads the dead letters.
const FIRST_FAILED_AT: &str = "lastseen-first-failed-at";
const LAST_FAILED_AT: &str = "lastseen-last-failed-at";

/// A copy that is not confirmed in this time is published again.
const COPY_TIMEOUT: Duration = Duration::from_secs(5);
const ACK_TIMEOUT: Duration = Duration::from_secs(15);

/// How a delivery is settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// It has had its effect.
    Ack,
    /// The attempt failed; it comes back after a wait that grows with the attempts.
    Retry {
        /// Why, for the logs and for the person who may find it among the dead letters.
        reason: String,
        /// The least wait that the peer asked for.
        after: Option<Duration>,
    },
    /// Given up, kept for a person in the dead-letter queue.
    DeadLetter {
        /// Why, as above.
        reason: String,
    },
}

/// Whether the settlement reached the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settled {
    /// The broker will not deliver the message again.
    Done,
    /// The channel it came by is gone: the broker delivers the message again.
    Lost,
}

/// A message in flight: taken from the queue and not settled. Dropping it settles nothing; the
/// broker redelivers it when the consumer's connection closes.
pub struct Delivery {
    id: Result<i64, DecodeError>,
    body: Vec<u8>,
    properties: BasicProperties,
    attempts: u32,
    redelivered: bool,
    acker: Acker,
    publisher: Publisher,
}

impl Delivery {
    pub(crate) fn new(received: message::Delivery, publisher: Publisher) -> Self {
        let message::Delivery { data: body, properties, redelivered, acker, .. } = received;
        let id = decode(&body);
        let attempts = failed_attempts(&properties);
        Self { id, body, properties, attempts, redelivered, acker, publisher }
    }

    /// The object to look up.
    ///
    /// # Errors
    /// [`DecodeError`] when the message names none; it belongs among the dead letters.
    pub fn id(&self) -> Result<i64, &DecodeError> {
        self.id.as_ref().copied()
    }

    /// The callback that named the object; empty for a message of the Go producer.
    #[must_use]
    pub fn callback_id(&self) -> &str {
        self.properties.correlation_id().as_ref().map_or("", |id| id.as_str())
    }

    /// How many attempts at this message have failed before.
    #[must_use]
    pub fn failed_attempts(&self) -> u32 {
        self.attempts
    }

    /// Whether the broker has delivered it before to a consumer that went away with it.
    #[must_use]
    pub fn redelivered(&self) -> bool {
        self.redelivered
    }

    /// Settles it. For a retry or a dead letter that means a copy, confirmed before the original is
    /// acked: between the two there may be two of them, never none. While the broker does not
    /// confirm, it is tried again for as long as the delivery's own channel lasts.
    pub async fn settle(self, disposition: Disposition) -> Settled {
        let kind = match disposition {
            Disposition::Ack => "ack",
            Disposition::Retry { reason, after } => {
                let wait = retry::wait(self.attempts + 1, after, rand::random());
                let expiration = wait.length.as_millis().to_string();
                let copy = Outgoing {
                    routing_key: self.publisher.topology().delays[wait.level].clone(),
                    body: self.body.clone(),
                    properties: self.copied_properties(&reason).with_expiration(expiration.into()),
                };
                if self.publish_copy(copy).await == Settled::Lost {
                    return counted("lost", Settled::Lost);
                }
                "retry"
            }
            Disposition::DeadLetter { reason } => {
                let copy = Outgoing {
                    routing_key: self.publisher.topology().dead.clone(),
                    body: self.body.clone(),
                    properties: self.copied_properties(&reason),
                };
                if self.publish_copy(copy).await == Settled::Lost {
                    return counted("lost", Settled::Lost);
                }
                "dead_letter"
            }
        };
        let acked = timeout(ACK_TIMEOUT, self.acker.ack(BasicAckOptions::default())).await;
        match acked {
            Ok(Ok(true)) => counted(kind, Settled::Done),
            // `Ok(false)` is lapin's word for an ack that was never sent.
            Ok(Ok(false) | Err(_)) | Err(_) => counted("lost", Settled::Lost),
        }
    }

    async fn publish_copy(&self, copy: Outgoing) -> Settled {
        for wait in link::backoff() {
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

    /// The message's own properties, with the history of its failures brought up to date.
    fn copied_properties(&self, reason: &str) -> BasicProperties {
        let now = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
        let before = self.properties.headers().clone().unwrap_or_default();
        let mut headers = FieldTable::default();
        for (name, value) in before.inner() {
            // x-death and its kin are the broker's own record of the delay queues.
            if !name.as_str().starts_with("x-") {
                headers.insert(name.clone(), value.clone());
            }
        }
        let text = |value: &str| AMQPValue::LongString(value.into());
        let first = headers.inner().get(FIRST_FAILED_AT).cloned().unwrap_or_else(|| text(&now));
        headers.insert(ATTEMPTS.into(), AMQPValue::LongLongInt((self.attempts + 1).into()));
        headers.insert(REASON.into(), text(reason));
        headers.insert(FIRST_FAILED_AT.into(), first);
        headers.insert(LAST_FAILED_AT.into(), text(&now));
        // The broker dates the copy by its own delay queue; an expiration would follow it for ever.
        let mut properties = BasicProperties::default().with_headers(headers);
        if let Some(content_type) = self.properties.content_type() {
            properties = properties.with_content_type(content_type.clone());
        }
        if let Some(callback_id) = self.properties.correlation_id() {
            properties = properties.with_correlation_id(callback_id.clone());
        }
        if let Some(published_at) = self.properties.timestamp() {
            properties = properties.with_timestamp(*published_at);
        }
        properties
    }
}

fn failed_attempts(properties: &BasicProperties) -> u32 {
    let headers = properties.headers().as_ref();
    // We write 64 bits; a broker or a tool on the way may have made it another size.
    let attempts = match headers.and_then(|headers| headers.inner().get(ATTEMPTS)) {
        Some(AMQPValue::ShortShortInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::ShortShortUInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::ShortInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::ShortUInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::LongInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::LongUInt(attempts)) => i64::from(*attempts),
        Some(AMQPValue::LongLongInt(attempts)) => *attempts,
        _ => 0,
    };
    u32::try_from(attempts).unwrap_or(0)
}

fn counted(disposition: &'static str, settled: Settled) -> Settled {
    metrics::counter!("lastseen_settled_total", "disposition" => disposition).increment(1);
    settled
}
