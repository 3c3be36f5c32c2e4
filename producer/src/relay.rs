//! The relay moves messages from the spool to the broker, oldest first, once the broker accepts
//! messages again.

use std::time::Duration;

use anyhow::bail;
use broker::{LinkStatus, PublishError, Publisher, Spool, Spooled};
use futures_util::future::join_all;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::broker_availability::BrokerAvailability;
use crate::spool_handle::SpoolHandle;

/// The pause between two attempts to open the spool.
const OPEN_INTERVAL: Duration = Duration::from_secs(5);
/// How often the relay checks an empty spool although no message was reported as added: a message
/// can be committed after its callback has given up.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The largest number of messages that are relayed at once. A broker that confirms slowly reaches
/// its full rate only with many messages in flight.
const BATCH_MAX: usize = 2_048;
/// Longer than a callback may wait: no client waits for the relay, and messages that are not
/// confirmed are published again.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) struct Relay {
    publisher: Publisher,
    /// A broker that confirms within this time is available to callbacks.
    callback_publish_timeout: Duration,
}

impl Relay {
    pub(crate) fn new(publisher: Publisher, callback_publish_timeout: Duration) -> Self {
        describe_metrics();
        Self { publisher, callback_publish_timeout }
    }

    /// `Ok` while the relay is connected to the broker, otherwise the reason why it is not.
    pub(crate) fn status(&self) -> watch::Receiver<LinkStatus> {
        self.publisher.status()
    }

    /// Relays until it is dropped, and opens the spool again if it is damaged or its file is gone.
    /// Dropping it loses nothing, but some messages may be published again at the next start.
    ///
    /// # Errors
    /// When the relay's publisher has stopped.
    pub(crate) async fn run(
        &self,
        handle: &SpoolHandle,
        broker: &BrokerAvailability,
    ) -> anyhow::Result<()> {
        let mut backoff = broker::backoff();
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
                () = self.publisher.died() => bail!("the relay's publisher stopped"),
            }
            handle.discard(spool);
            if opened_at.elapsed() > OPEN_INTERVAL {
                backoff = broker::backoff();
            }
            sleep(backoff.next().unwrap_or(OPEN_INTERVAL)).await;
            handle.reopen().await;
        }
    }

    pub(crate) async fn close(self) {
        self.publisher.close().await;
    }

    /// Relays the messages of one spool. Never returns.
    async fn relay_all(&self, handle: &SpoolHandle, spool: &Spool, broker: &BrokerAvailability) {
        let mut backoff = broker::backoff();
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
            // It also returns if the publisher has stopped; `run` then ends the process.
            self.publisher.wait_until_open().await;
            let started = Instant::now();
            let confirmed = self.publish(&messages).await;
            let took = started.elapsed();
            let all_confirmed = confirmed.len() == messages.len();
            // While the broker is slow, callbacks go to the spool, so that no message exists twice.
            let in_time = all_confirmed && took < self.callback_publish_timeout;
            broker.set(in_time);
            if !confirmed.is_empty() {
                relayed_since_empty += confirmed.len();
                self.remove(spool, confirmed).await;
            }
            if all_confirmed {
                backoff = broker::backoff();
                limit = (4 * limit).min(BATCH_MAX);
                if in_time {
                    // Half of the time belongs to new callbacks.
                    sleep(took).await;
                }
            } else {
                limit = 1;
                sleep(backoff.next().unwrap_or(OPEN_INTERVAL)).await;
            }
        }
    }

    /// Publishes the messages of each callback as one batch. Returns the numbers of the confirmed
    /// ones.
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

    /// Removes confirmed messages until that succeeds. Otherwise they would be published again.
    async fn remove(&self, spool: &Spool, confirmed: Vec<i64>) {
        let count = confirmed.len();
        for pause in broker::backoff() {
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
