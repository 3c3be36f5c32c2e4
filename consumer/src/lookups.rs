//! From a delivery to its settlement.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use broker::{Consumer, Delivery, Disposition};
use service::CancellationToken;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use crate::config::Lookups;
use crate::status_api::{Answer, LookupError, StatusApi};
use crate::writer::{Writer, WriterDied};

/// Takes deliveries, and runs up to `MAX_CONSUMERS` lookups at once.
pub(crate) struct Intake {
    max_consumers: usize,
    max_unsettled: usize,
    shared: Arc<Shared>,
}

/// What each lookup needs.
struct Shared {
    status_api: StatusApi,
    writer: Writer,
    max_attempts: u32,
    failure_log: FailureLog,
}

impl Intake {
    pub(crate) fn new(config: &Lookups, status_api: StatusApi, writer: Writer) -> Self {
        describe_metrics();
        let shared = Shared {
            status_api,
            writer,
            max_attempts: config.max_attempts,
            failure_log: FailureLog::default(),
        };
        Self {
            max_consumers: config.max_consumers.into(),
            max_unsettled: config.prefetch().into(),
            shared: Arc::new(shared),
        }
    }

    /// Looks up what is delivered until `shutdown`, then finishes what is in flight.
    ///
    /// # Errors
    /// When a lookup panicked or the writer has died: its delivery would stay unsettled for as long
    /// as this process lives, so the process must not.
    pub(crate) async fn run(
        self,
        mut deliveries: Consumer,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        let permits = Arc::new(Semaphore::new(self.max_consumers));
        let mut in_flight = JoinSet::new();
        let settled = |ended: Result<Result<(), WriterDied>, _>| -> anyhow::Result<()> {
            Ok(ended.context("a lookup panicked")??)
        };
        loop {
            // The permit comes first: what is taken is looked up at once.
            let permit = tokio::select! {
                permit = Arc::clone(&permits).acquire_owned() => permit?,
                () = shutdown.cancelled() => break,
            };
            let delivery = {
                let mut next = pin!(deliveries.next());
                loop {
                    // The prefetch bounds them too, but each session of the broker's anew.
                    let room = in_flight.len() < self.max_unsettled;
                    tokio::select! {
                        delivery = &mut next, if room => break Some(delivery),
                        Some(ended) = in_flight.join_next() => settled(ended)?,
                        () = shutdown.cancelled() => break None,
                    }
                }
            };
            let Some(delivery) = delivery else { break };
            in_flight.spawn(look_up_and_settle(Arc::clone(&self.shared), delivery, permit));
            while let Some(ended) = in_flight.try_join_next() {
                settled(ended)?;
            }
        }
        deliveries.stop().await;
        tracing::info!(in_flight = in_flight.len(), "finishing the lookups in flight");
        while let Some(ended) = in_flight.join_next().await {
            settled(ended)?;
        }
        deliveries.close().await;
        Ok(())
    }
}

/// Looks one delivery's object up, has the result committed, and settles the delivery.
async fn look_up_and_settle(
    shared: Arc<Shared>,
    delivery: Delivery,
    permit: OwnedSemaphorePermit,
) -> Result<(), WriterDied> {
    let disposition = match delivery.id() {
        Ok(id) => {
            let callback_id = delivery.callback_id();
            let answer = shared.look_up(id).await;
            // Waiting for the commit, or for the copy of a failed one, takes no lookup's place.
            drop(permit);
            tracing::debug!(id, callback_id, ?answer, "looked up");
            match answer {
                Ok(Answer::Online(at)) => {
                    shared.writer.record(id, at).await?;
                    Disposition::Ack
                }
                Ok(Answer::Offline) => Disposition::Ack,
                Err(error) => shared.after_failure(id, &delivery, &error),
            }
        }
        Err(error) => {
            drop(permit);
            tracing::warn!(%error, "a message that cannot be read goes to the dead letters");
            Disposition::DeadLetter { reason: error.to_string() }
        }
    };
    let (id, callback_id) = (delivery.id().ok(), delivery.callback_id().to_owned());
    let settled = delivery.settle(disposition).await;
    tracing::debug!(id, callback_id, ?settled, "settled");
    Ok(())
}

impl Shared {
    async fn look_up(&self, id: i64) -> Result<Answer, LookupError> {
        let in_flight = metrics::gauge!("lastseen_lookups_in_flight");
        in_flight.increment(1.0);
        let started = Instant::now();
        let answer = self.status_api.look_up(id).await;
        in_flight.decrement(1.0);
        metrics::histogram!("lastseen_lookup_seconds").record(started.elapsed());
        let outcome = match &answer {
            Ok(Answer::Online(_)) => "online",
            Ok(Answer::Offline) => "offline",
            Err(error) => error.label(),
        };
        metrics::counter!("lastseen_lookups_total", "outcome" => outcome).increment(1);
        answer
    }

    fn after_failure(&self, id: i64, delivery: &Delivery, error: &LookupError) -> Disposition {
        let attempts = delivery.failed_attempts() + 1;
        let callback_id = delivery.callback_id();
        let reason = error.to_string();
        if attempts >= self.max_attempts {
            tracing::warn!(id, callback_id, attempts, reason, "given up; now a dead letter");
            return Disposition::DeadLetter { reason };
        }
        self.failure_log.note(id, callback_id, attempts, &reason);
        Disposition::Retry { reason, after: error.retry_after() }
    }
}

/// Tells of failed lookups in at most one line every few seconds: when the API is down, each of
/// hundreds per second fails, and they all say the same.
#[derive(Default)]
struct FailureLog(Mutex<Failures>);

#[derive(Default)]
struct Failures {
    untold: u32,
    told_at: Option<Instant>,
}

impl FailureLog {
    const INTERVAL: Duration = Duration::from_secs(5);

    fn note(&self, id: i64, callback_id: &str, attempts: u32, reason: &str) {
        tracing::debug!(id, callback_id, attempts, reason, "lookup failed");
        let mut failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        failures.untold += 1;
        if failures.told_at.is_some_and(|told_at| told_at.elapsed() < Self::INTERVAL) {
            return;
        }
        let count = std::mem::take(&mut failures.untold);
        failures.told_at = Some(Instant::now());
        tracing::warn!(
            count,
            id,
            callback_id,
            attempts,
            reason,
            "lookups failed, this one the latest; they will be tried again"
        );
    }
}

fn describe_metrics() {
    metrics::describe_counter!("lastseen_lookups_total", "Lookups by outcome.");
    metrics::describe_gauge!("lastseen_lookups_in_flight", "Lookups running now.");
    metrics::describe_histogram!(
        "lastseen_lookup_seconds",
        metrics::Unit::Seconds,
        "Time that a lookup took, whatever its outcome."
    );
}
