//! The relay moves messages from the spool to the broker, oldest first, once the broker accepts
//! messages again.

use std::time::Duration;

use futures_util::future::join_all;
use messaging::queue::{PublishError, Publisher, Spool, Spooled};
use tokio::time::{Instant, sleep};

use crate::broker_availability::BrokerAvailability;
use crate::spool_handle::SpoolHandle;

/// The pause between two attempts to open the spool.
const OPEN_INTERVAL: Duration = Duration::from_secs(5);
/// How often the relay checks an empty spool even if no callback has reported a new message. The
/// spool can commit a message after its callback has given up.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The most relayed messages in flight. A broker that confirms slowly reaches its full rate only
/// with many messages in flight.
const BATCH_MAX: usize = 2_048;
/// Longer than a callback may wait, because no client waits for the relay. A message that is not
/// confirmed within this time is published again, and may then be in the queue twice.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) struct Relay {
    pub(crate) publisher: Publisher,
    /// A broker that confirms within this time counts as available.
    callback_publish_timeout: Duration,
}

impl Relay {
    pub(crate) fn new(publisher: Publisher, callback_publish_timeout: Duration) -> Self {
        describe_metrics();
        Self { publisher, callback_publish_timeout }
    }

    /// Relays messages until the future is dropped, and reopens the spool if its file is damaged or
    /// gone. Dropping the future loses no message, but the next start may publish some again.
    pub(crate) async fn run(&self, handle: &SpoolHandle, broker: &BrokerAvailability) {
        let mut backoff = messaging::amqp::backoff();
        loop {
            let Some(spool) = handle.get() else {
                sleep(OPEN_INTERVAL).await;
                handle.reopen().await;
                continue;
            };
            let opened_at = Instant::now();
            tokio::select! {
                () = self.relay_all(handle, &spool, broker) => {}
                () = handle.monitor(&spool) => {}
            }
            handle.discard(spool);
            if opened_at.elapsed() > OPEN_INTERVAL {
                backoff = messaging::amqp::backoff();
            }
            sleep(backoff.next().unwrap_or(OPEN_INTERVAL)).await;
            handle.reopen().await;
        }
    }

    /// Relays the messages of one spool. Never returns.
    async fn relay_all(&self, handle: &SpoolHandle, spool: &Spool, broker: &BrokerAvailability) {
        let mut backoff = messaging::amqp::backoff();
        // The first message is a probe.
        let mut limit = 1;
        let mut relayed_since_empty = 0;
        loop {
            let messages = match spool.oldest(limit).await {
                Ok(messages) => messages,
                Err(error) => {
                    tracing::debug!(%error, "cannot read the spool; trying again");
                    sleep(backoff.next().unwrap_or(OPEN_INTERVAL)).await;
                    continue;
                }
            };
            if messages.is_empty() {
                if relayed_since_empty > 0 {
                    tracing::info!(relayed = relayed_since_empty, "the spool is empty again");
                    relayed_since_empty = 0;
                }
                handle.message_added(CHECK_INTERVAL).await;
                continue;
            }
            // This also returns if the publisher has stopped; then the process ends.
            self.publisher.wait_until_open().await;
            let started = Instant::now();
            let confirmed = self.publish(&messages).await;
            let took = started.elapsed();
            let all_confirmed = confirmed.len() == messages.len();
            // A slow broker counts as unavailable, so that callbacks go to the spool at once. After
            // a late confirm, their messages would be both in the queue and in the spool.
            let in_time = all_confirmed && took < self.callback_publish_timeout;
            broker.set(in_time);
            if !confirmed.is_empty() {
                relayed_since_empty += confirmed.len();
                self.remove(spool, confirmed).await;
            }
            if all_confirmed {
                backoff = messaging::amqp::backoff();
                limit = (4 * limit).min(BATCH_MAX);
                if in_time {
                    // Leave half of the broker's time to new callbacks.
                    sleep(took).await;
                }
            } else {
                limit = 1;
                sleep(backoff.next().unwrap_or(OPEN_INTERVAL)).await;
            }
        }
    }

    /// Publishes the messages of each callback as one batch. Returns the numbers of the confirmed
    /// messages.
    async fn publish(&self, messages: &[Spooled]) -> Vec<i64> {
        let callbacks = messages.chunk_by(|one, next| one.origin() == next.origin());
        let published = callbacks.map(async |messages| {
            let origin = messages[0].origin();
            let ids: Vec<i64> = messages.iter().map(|message| message.id).collect();
            let refused = match self.publisher.publish_ids(origin, &ids, PUBLISH_TIMEOUT).await {
                Ok(()) => Vec::new(),
                Err(PublishError::Refused { positions }) => positions,
                Err(error) => {
                    let callback_id = origin.callback_id;
                    tracing::debug!(%error, callback_id, "messages not relayed; trying again");
                    return Vec::new();
                }
            };
            let confirmed = messages.iter().enumerate().filter(|(at, _)| !refused.contains(at));
            confirmed.map(|(_, message)| message.number).collect()
        });
        join_all(published).await.concat()
    }

    /// Removes confirmed messages from the spool, and tries again until it succeeds. Otherwise the
    /// relay would publish these messages again.
    async fn remove(&self, spool: &Spool, confirmed: Vec<i64>) {
        let count = confirmed.len();
        for pause in messaging::amqp::backoff() {
            match spool.remove(confirmed.clone()).await {
                Ok(()) => break,
                Err(error) => {
                    tracing::debug!(%error, "cannot remove relayed messages; trying again");
                }
            }
            sleep(pause).await;
        }
        metrics::counter!("lastseen_relayed_total").increment(count as u64);
    }
}

fn describe_metrics() {
    metrics::describe_counter!("lastseen_relayed_total", "Messages relayed to the broker.");
    // Registered at the start, so that the first increment counts as growth.
    metrics::counter!("lastseen_relayed_total").increment(0);
}
