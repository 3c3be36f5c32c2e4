//! Stores a callback's messages durably: in the broker or, if the broker does not confirm them, in
//! the spool.

use std::borrow::Cow;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use messaging::queue::{Broker, Destination, Origin, PublishError, Publisher, SpoolError};
use runtime::traces::{KeyValue, Span, SpanKind, Step};
use runtime::{CriticalTask, Health, Status, Supervisor};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::broker_availability::{BrokerAvailability, BrokerOutcome};
use crate::config::Callbacks;
use crate::deadline::Deadline;
use crate::relay::Relay;
use crate::spool_handle::SpoolHandle;

/// The time that the spool has to store a callback. Together with `PUBLISH_TIMEOUT` (at most
/// 400 ms), it is shorter than the second that the client waits.
const SPOOL_TIMEOUT: Duration = Duration::from_millis(500);
/// The default of `SPOOL_DIR`.
const SPOOL_DIR: &str = "./spool";

/// Some messages of a callback may not be durable. Contains the error of the broker and, if the
/// spool was tried, that of the spool.
#[derive(Debug, thiserror::Error)]
#[error("{broker}{}", spool.as_ref().map(|error| format!("; {error}")).unwrap_or_default())]
pub(crate) struct NotStored {
    broker: PublishError,
    spool: Option<SpoolError>,
}

pub(crate) struct DurableSink {
    publisher: Publisher,
    destination: Destination,
    publish_timeout: Duration,
    /// `None` if the queue is itself a file on this disk.
    fallback: Option<Arc<Fallback>>,
}

/// Stores messages while the broker does not confirm them, and relays them later.
struct Fallback {
    spool: SpoolHandle,
    broker: BrokerAvailability,
    relay: Relay,
}

impl DurableSink {
    /// Starts to connect to the broker, and opens the spool. If the spool cannot be opened, the
    /// relay tries again.
    pub(crate) async fn open(callbacks: &Callbacks, broker: Broker) -> Self {
        let publish_timeout = callbacks.publish_timeout;
        let destination = broker.destination();
        let publisher = Publisher::start(broker.clone(), "producer");
        let fallback = if broker.is_file() {
            None
        } else {
            // The relay has its own connection, because relayed messages would delay the confirms
            // of callbacks.
            let relay = Publisher::start(broker, "producer: relay");
            let directory = callbacks.spool_dir.clone().unwrap_or_else(|| PathBuf::from(SPOOL_DIR));
            Some(Arc::new(Fallback {
                spool: SpoolHandle::open(directory.join("spool.db"), callbacks.spool_max_bytes)
                    .await,
                broker: BrokerAvailability::new(),
                relay: Relay::new(relay, publish_timeout),
            }))
        };
        Self { publisher, destination, publish_timeout, fallback }
    }

    /// The deadline of a request. The client waits for one second, and the deadline leaves part of
    /// that second to transmit the response.
    pub(crate) fn deadline(&self, arrived: Instant) -> Deadline {
        Deadline::new(arrived, self.publish_timeout.saturating_add(SPOOL_TIMEOUT))
    }

    /// Stores a durable message for each of `ids` before the deadline.
    ///
    /// # Errors
    /// [`NotStored`]; some of the messages may be durable all the same.
    pub(crate) async fn store(
        &self,
        callback: &Span,
        callback_id: &str,
        ids: &[i64],
        deadline: Deadline,
    ) -> Result<(), NotStored> {
        let mut span = callback.child(|| self.publish_step(callback_id, ids));
        let traceparent = span.traceparent();
        let origin = Origin { callback_id, traceparent: traceparent.as_deref() };
        let stored = self.publish_or_spool(&mut span, origin, ids, deadline).await;
        if let Err(error) = &stored {
            span.fail(error);
        }
        stored
    }

    /// Returns `Ok` only once the broker has confirmed the messages or the spool has them on disk.
    /// This is the producer's central promise.
    ///
    /// 1. Try the broker, unless it is unavailable and there is a spool.
    /// 2. Add the ids that the broker has not confirmed to the spool.
    /// 3. If the spool does not store them either, wait for the broker's confirm until the
    ///    deadline, unless the broker has failed already. If step 1 was skipped, publish them now.
    async fn publish_or_spool(
        &self,
        span: &mut Span,
        origin: Origin<'_>,
        ids: &[i64],
        deadline: Deadline,
    ) -> Result<(), NotStored> {
        let time_left = deadline.remaining();
        // The first poll of this future sends the messages.
        let mut publishing = pin!(self.publisher.publish_ids(origin, ids, time_left));
        let Some(Fallback { spool, broker, .. }) = self.fallback.as_deref() else {
            return publishing.await.map_err(|broker| NotStored { broker, spool: None });
        };

        let outcome = if broker.is_available() || spool.get().is_none() {
            self.try_broker(publishing.as_mut(), spool, time_left).await
        } else {
            BrokerOutcome::NotTried
        };
        if let BrokerOutcome::Confirmed = outcome {
            return Ok(());
        }

        let mut spool_error = None;
        // Check again, because the spool may have been opened since the callback arrived.
        if let Some(open_spool) = spool.get() {
            // Update before spooling, so that the next callbacks go to the spool at once.
            broker.update(&outcome);
            span.set("lastseen.spooled", true);
            let unconfirmed = unconfirmed_ids(ids, &outcome);
            let within = deadline.remaining().min(SPOOL_TIMEOUT);
            match spool.add(&open_spool, origin, &unconfirmed, within).await {
                Ok(()) => return Ok(()),
                Err(error) => spool_error = Some(error),
            }
        }

        let outcome = match outcome {
            BrokerOutcome::Failed(_) => outcome,
            _ => match timeout_at(deadline.at(), publishing).await {
                Ok(published) => published.into(),
                Err(_) => BrokerOutcome::Failed(PublishError::Timeout(time_left)),
            },
        };
        broker.update(&outcome);
        match outcome {
            BrokerOutcome::Failed(error) => Err(NotStored { broker: error, spool: spool_error }),
            _ => Ok(()),
        }
    }

    /// Waits for the broker's confirm. After the broker's share of the time, stops waiting as soon
    /// as the spool is open.
    async fn try_broker(
        &self,
        publishing: Pin<&mut impl Future<Output = Result<(), PublishError>>>,
        spool: &SpoolHandle,
        time_left: Duration,
    ) -> BrokerOutcome {
        let spool_is_next = async {
            sleep(self.broker_share(time_left)).await;
            spool.wait_until_open().await;
        };
        tokio::select! {
            // Check for the confirm first, so that a task that is polled late does not spool
            // confirmed messages.
            biased;
            published = publishing => published.into(),
            () = spool_is_next => BrokerOutcome::Late,
        }
    }

    /// The time that the broker has before the spool is tried: `PUBLISH_TIMEOUT`, or less in
    /// proportion if the request has already used part of its time, for example for its body.
    fn broker_share(&self, time_left: Duration) -> Duration {
        let budget = self.publish_timeout.saturating_add(SPOOL_TIMEOUT);
        let share = self.publish_timeout.as_secs_f64() / budget.as_secs_f64();
        time_left.mul_f64(share).min(self.publish_timeout)
    }

    fn publish_step(&self, callback_id: &str, ids: &[i64]) -> Step {
        let Destination { system, name } = &self.destination;
        Step {
            name: format!("publish {name}").into(),
            kind: SpanKind::Producer,
            attributes: vec![
                KeyValue::new("messaging.system", *system),
                KeyValue::new("messaging.destination.name", name.clone()),
                KeyValue::new("messaging.operation.name", "publish"),
                KeyValue::new("messaging.operation.type", "send"),
                KeyValue::new("messaging.message.conversation_id", callback_id.to_owned()),
                KeyValue::new(
                    "messaging.batch.message_count",
                    i64::try_from(ids.len()).unwrap_or(i64::MAX),
                ),
            ],
        }
    }

    /// Reports the dependencies to `health`. The producer needs the broker or the spool, not both.
    pub(crate) fn report_to(&self, health: &Health) {
        let broker = self.publisher.status();
        let Some(Fallback { spool, relay, .. }) = self.fallback.as_deref() else {
            return health.add_required("broker", broker);
        };
        health.add_required("durable store", either(broker.clone(), spool.status()));
        health.add_optional("broker", broker);
        health.add_optional("broker for the relay", relay.publisher.status());
        health.add_optional("spool", spool.status());
        health.add_optional("intact spool", spool.integrity());
    }

    /// Starts the relay, if there is a spool. Stop it before [`DurableSink::close`], which cannot
    /// close the spool while the relay uses it.
    pub(crate) fn spawn_relay(&self, supervisor: &Supervisor) -> Option<CriticalTask> {
        let fallback = Arc::clone(self.fallback.as_ref()?);
        Some(supervisor.spawn_critical("relay", async move {
            let Fallback { spool, broker, relay } = &*fallback;
            relay.run(spool, broker).await;
        }))
    }

    // Decision: docs/decisions/0080-how-does-a-producer-that-is-removed-empty-its-spool.md
    /// Returns when the relay has emptied the spool, or at once if there is no spool.
    pub(crate) async fn drain_spool(&self) {
        if let Some(fallback) = &self.fallback {
            fallback.spool.wait_until_empty().await;
        }
    }

    /// Closes the broker connections and the spool, whose messages stay for the next start.
    pub(crate) async fn close(self) {
        let close_fallback = async {
            if let Some(Fallback { spool, relay, .. }) = self.fallback.and_then(Arc::into_inner) {
                spool.close().await;
                relay.publisher.close().await;
            }
        };
        tokio::join!(self.publisher.close(), close_fallback);
    }
}

/// Those of `ids` that the broker has not confirmed.
fn unconfirmed_ids<'ids>(ids: &'ids [i64], outcome: &BrokerOutcome) -> Cow<'ids, [i64]> {
    match outcome {
        BrokerOutcome::Failed(PublishError::Refused { positions }) => {
            positions.iter().filter_map(|position| ids.get(*position).copied()).collect()
        }
        _ => Cow::Borrowed(ids),
    }
}

/// A status that is `Ok` while at least one of the two is `Ok`.
fn either(
    mut broker: watch::Receiver<Status>,
    mut spool: watch::Receiver<Status>,
) -> watch::Receiver<Status> {
    let (status, receiver) = watch::channel(combined(&mut broker, &mut spool));
    tokio::spawn(async move {
        loop {
            let changed = tokio::select! {
                changed = broker.changed() => changed,
                changed = spool.changed() => changed,
                () = status.closed() => return,
            };
            if changed.is_err() {
                return;
            }
            _ = status.send_replace(combined(&mut broker, &mut spool));
        }
    });
    receiver
}

fn combined(broker: &mut watch::Receiver<Status>, spool: &mut watch::Receiver<Status>) -> Status {
    match (&*broker.borrow_and_update(), &*spool.borrow_and_update()) {
        (Err(broker), Err(spool)) => Err(format!("broker: {broker}; spool: {spool}")),
        _ => Ok(()),
    }
}
