//! The durable places of a callback: the broker, and while that takes nothing, the spool.

use std::borrow::Cow;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use broker::{Destination, LinkStatus, Origin, PublishError, Publisher, SpoolError};
use service::Health;
use service::traces::{KeyValue, Span, SpanKind, Step};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::config::Config;
use crate::deadline::Deadline;
use crate::relay::Outage;

/// How long the spool may take to store a callback. With `PUBLISH_TIMEOUT` before it, the answer is
/// there within the client's second.
const SPOOL_TIMEOUT: Duration = Duration::from_millis(500);
/// Where the spool is unless `SPOOL_DIR` says otherwise.
const SPOOL_DIR: &str = "./spool";

/// Why no place has taken a callback, or not all of it.
#[derive(Debug, thiserror::Error)]
#[error("{broker}{}", spool.as_ref().map(|error| format!("; {error}")).unwrap_or_default())]
pub(crate) struct Unavailable {
    pub(crate) broker: PublishError,
    spool: Option<SpoolError>,
}

pub(crate) struct Places {
    publisher: Publisher,
    destination: Destination,
    publish_timeout: Duration,
    /// None if the broker is itself a file on this disk.
    outage: Option<Arc<Outage>>,
}

impl Places {
    /// Starts to look for the broker, and opens the spool if it can be opened.
    ///
    /// # Errors
    /// When the broker is a file that cannot be opened.
    pub(crate) async fn open(config: &Config) -> anyhow::Result<Self> {
        let Config { callbacks, broker, .. } = config;
        let publisher = Publisher::start(broker, "producer")?;
        let outage = if broker.amqp_uri.is_file() {
            None
        } else {
            // On a connection of its own: what waits must not come between a callback and its confirm.
            let relay = Publisher::start(broker, "producer: relay")?;
            let directory = callbacks.spool_dir.clone().unwrap_or_else(|| PathBuf::from(SPOOL_DIR));
            let path = directory.join("spool.db");
            Some(Arc::new(
                Outage::begin(path, callbacks.spool_max_bytes, callbacks.publish_timeout, relay)
                    .await,
            ))
        };
        let destination = broker.destination();
        Ok(Self { publisher, destination, publish_timeout: callbacks.publish_timeout, outage })
    }

    /// The deadline of a request: it leaves something of the client's second for the way back.
    pub(crate) fn deadline(&self, arrived: Instant) -> Deadline {
        Deadline::new(arrived, self.publish_timeout.saturating_add(SPOOL_TIMEOUT))
    }

    /// Makes a durable message of each of `ids` before the deadline.
    ///
    /// # Errors
    /// [`Unavailable`]: some of them may be durable all the same.
    pub(crate) async fn take(
        &self,
        callback: &Span,
        callback_id: &str,
        ids: &[i64],
        deadline: Deadline,
    ) -> Result<(), Unavailable> {
        let mut span = callback.child(|| self.publishing(callback_id, ids));
        let traceparent = span.traceparent();
        let origin = Origin { callback_id, traceparent: traceparent.as_deref() };
        let taken = self.publish_or_spool(&mut span, origin, ids, deadline).await;
        if let Err(error) = &taken {
            span.fail(error);
        }
        taken
    }

    async fn publish_or_spool(
        &self,
        span: &mut Span,
        origin: Origin<'_>,
        ids: &[i64],
        deadline: Deadline,
    ) -> Result<(), Unavailable> {
        let within = deadline.remaining();
        let mut publishing = pin!(self.publisher.publish_ids(origin, ids, within));
        let Some(outage) = &self.outage else {
            return publishing.await.map_err(|broker| Unavailable { broker, spool: None });
        };
        let mut refused = None;
        let is_asked_first = outage.broker_takes() || outage.spool().is_none();
        if is_asked_first {
            let another_place = async {
                sleep(self.share_of_the_broker(within)).await;
                outage.opened().await;
            };
            tokio::select! {
                // In this order: what is confirmed must not be spooled because this was not polled for a while.
                biased;
                published = publishing.as_mut() => match published {
                    Ok(()) => return Ok(()),
                    Err(error) => refused = Some(error),
                },
                // Its confirm may still come, should the spool not take it.
                () = another_place => {}
            }
        }
        let mut unspooled = None;
        // It may have been opened since the callback came.
        if let Some(spool) = outage.spool() {
            if is_asked_first && !is_full(refused.as_ref()) {
                outage.set_broker_takes(false);
            }
            let unconfirmed = refused.as_ref().map_or(Cow::Borrowed(ids), |error| left(ids, error));
            span.set("lastseen.spooled", true);
            let left = deadline.remaining().min(SPOOL_TIMEOUT);
            let added = spool.add(origin, &unconfirmed, left).await;
            outage.note(&spool, &added, unconfirmed.len());
            match added {
                Ok(()) => return Ok(()),
                Err(error) => unspooled = Some(error),
            }
        }
        let published = match refused {
            Some(error) => Err(error),
            // Now it is the only place, and has what is left of the time.
            None => match timeout_at(deadline.at(), publishing).await {
                Ok(published) => published,
                Err(_) => Err(PublishError::Timeout(within)),
            },
        };
        // One that has more to confirm than it may have takes messages all the same.
        if !is_full(published.as_ref().err()) {
            outage.set_broker_takes(published.is_ok());
        }
        published.map_err(|broker| Unavailable { broker, spool: unspooled })
    }

    /// Of the time that is left, what the broker has before the spool is asked: `PUBLISH_TIMEOUT`, or its share
    /// if the request has waited for something else before.
    fn share_of_the_broker(&self, left: Duration) -> Duration {
        let all = self.publish_timeout.saturating_add(SPOOL_TIMEOUT);
        let share = self.publish_timeout.as_secs_f64() / all.as_secs_f64();
        left.mul_f64(share).min(self.publish_timeout)
    }

    fn publishing(&self, callback_id: &str, ids: &[i64]) -> Step {
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

    /// Tells what it needs: one of the two.
    pub(crate) fn tell(&self, health: &Health) {
        let broker = self.publisher.status();
        let Some(outage) = &self.outage else { return health.needs("broker", broker) };
        health.needs("a durable place", either(broker.clone(), outage.status()));
        health.wants("broker", broker);
        health.wants("broker for the spool", outage.relay_status());
        health.wants("spool", outage.status());
        health.wants("intact spool", outage.kept());
    }

    /// Relays what is in the spool to the broker, for as long as this is polled.
    ///
    /// # Errors
    /// When a part has died without which nothing could be accepted any more.
    pub(crate) async fn serve(&self) -> anyhow::Result<()> {
        let relay = async {
            match &self.outage {
                None => std::future::pending().await,
                Some(outage) => outage.relay().await,
            }
        };
        tokio::select! {
            relayed = relay => relayed,
            () = self.publisher.died() => anyhow::bail!("the publisher has died"),
        }
    }

    /// Says goodbye to the broker and closes the spool; what is in it stays for the next start.
    pub(crate) async fn close(self) {
        let spool = async {
            if let Some(outage) = self.outage.and_then(Arc::into_inner) {
                outage.close().await;
            }
        };
        tokio::join!(self.publisher.close(), spool);
    }
}

fn is_full(error: Option<&PublishError>) -> bool {
    matches!(error, Some(PublishError::Full(_)))
}

/// What the broker has not confirmed of `ids`.
fn left<'ids>(ids: &'ids [i64], error: &PublishError) -> Cow<'ids, [i64]> {
    match error {
        PublishError::Refused { which } => {
            which.iter().filter_map(|position| ids.get(*position).copied()).collect()
        }
        _ => Cow::Borrowed(ids),
    }
}

/// `Ok` while one of the two is.
fn either(
    mut broker: watch::Receiver<LinkStatus>,
    mut spool: watch::Receiver<LinkStatus>,
) -> watch::Receiver<LinkStatus> {
    let (status, watched) = watch::channel(joined(&mut broker, &mut spool));
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
            _ = status.send_replace(joined(&mut broker, &mut spool));
        }
    });
    watched
}

fn joined(
    broker: &mut watch::Receiver<LinkStatus>,
    spool: &mut watch::Receiver<LinkStatus>,
) -> LinkStatus {
    match (&*broker.borrow_and_update(), &*spool.borrow_and_update()) {
        (Err(broker), Err(spool)) => Err(format!("broker: {broker}; spool: {spool}")),
        _ => Ok(()),
    }
}
