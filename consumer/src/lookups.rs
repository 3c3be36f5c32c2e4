//! From a delivery to its settlement.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use broker::{Consumer, Delivery, Disposition};
use service::CancellationToken;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::breaker::{Breaker, Outcome, Place, Verdict};
use crate::config::Lookups;
use crate::status_api::{Answer, LookupError, StatusApi};
use crate::writer::{Writer, WriterDied, Written};

/// A delivery is kept for another lookup for as long as so many may take, and then sent to the end of
/// the queue: maybe another consumer has a better way to the API, and RabbitMQ ends the session of one
/// that holds a message for 30 minutes.
const LOOKUPS_HELD: u32 = 6;
const HELD_MAX: Duration = Duration::from_mins(15);

/// Takes deliveries, and runs as many lookups at once as the breaker lets.
pub(crate) struct Intake {
    max_unsettled: usize,
    shared: Arc<Shared>,
}

/// What each lookup needs.
struct Shared {
    status_api: StatusApi,
    breaker: Arc<Breaker>,
    writer: Writer,
    max_attempts: u32,
    held_max: Duration,
    shutdown: CancellationToken,
    failure_log: FailureLog,
}

impl Intake {
    pub(crate) fn new(
        config: &Lookups,
        status_api: StatusApi,
        breaker: Arc<Breaker>,
        writer: Writer,
        shutdown: CancellationToken,
    ) -> Self {
        describe_metrics();
        let shared = Shared {
            status_api,
            breaker,
            writer,
            max_attempts: config.max_attempts,
            held_max: config.status_timeout.saturating_mul(LOOKUPS_HELD).min(HELD_MAX),
            shutdown,
            failure_log: FailureLog::default(),
        };
        Self { max_unsettled: config.prefetch().into(), shared: Arc::new(shared) }
    }

    /// Looks up what is delivered until the shutdown, then finishes the lookups that run, and gives
    /// back what waits for one.
    ///
    /// # Errors
    /// When a part that the lookups need has died: deliveries would stay unsettled for as long as this
    /// process lives, so the process must not.
    pub(crate) async fn run(self, mut deliveries: Consumer) -> anyhow::Result<()> {
        let Shared { breaker, shutdown, .. } = &*self.shared;
        let mut in_flight = JoinSet::new();
        let settled = |ended: Result<Result<(), WriterDied>, _>| -> anyhow::Result<()> {
            Ok(ended.context("a lookup panicked")??)
        };
        loop {
            let delivery = {
                let mut next = pin!(deliveries.next());
                loop {
                    // The prefetch bounds them too, but each session of the broker's anew.
                    let room = in_flight.len() < self.max_unsettled;
                    // The place comes first: what is taken is looked up at once.
                    let taken = async {
                        breaker.wants_more().await;
                        next.as_mut().await
                    };
                    tokio::select! {
                        delivery = taken, if room => break Some(delivery),
                        Some(ended) = in_flight.join_next() => settled(ended)?,
                        () = shutdown.cancelled() => break None,
                    }
                }
            };
            let Some(delivery) = delivery else { break };
            let place = breaker.try_enter();
            in_flight.spawn(look_up_and_settle(Arc::clone(&self.shared), delivery, place));
            while let Some(ended) = in_flight.try_join_next() {
                settled(ended)?;
            }
        }
        deliveries.stop().await;
        tracing::info!(in_flight = in_flight.len(), "finishing the lookups in flight");
        while let Some(ended) = in_flight.join_next().await {
            settled(ended)?;
        }
        // With it, what was dropped unsettled is given back.
        deliveries.close().await;
        Ok(())
    }
}

/// Looks one delivery's object up, has the result committed, and settles the delivery; or drops it, to
/// be given back, at the shutdown.
async fn look_up_and_settle(
    shared: Arc<Shared>,
    delivery: Delivery,
    place: Option<Place>,
) -> Result<(), WriterDied> {
    let disposition = match delivery.id() {
        Ok(id) => match shared.look_up_until_it_tells(id, &delivery, place).await? {
            Some(disposition) => disposition,
            None => return Ok(()),
        },
        Err(error) => {
            drop(place);
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
    /// Looks the object up, and again for as long as a failure may be nobody's but the API's. `None`
    /// means that the process drains before that is known.
    async fn look_up_until_it_tells(
        &self,
        id: i64,
        delivery: &Delivery,
        mut place: Option<Place>,
    ) -> Result<Option<Disposition>, WriterDied> {
        let callback_id = delivery.callback_id();
        let mut held = pin!(sleep(self.held_max));
        let mut waits = waits_between_lookups();
        loop {
            let enter = async {
                match place.take() {
                    Some(place) => place,
                    None => self.breaker.enter().await,
                }
            };
            let place = tokio::select! {
                // In this order, or a place that is there already would be lost for a moment.
                biased;
                place = enter => place,
                () = self.shutdown.cancelled() => return Ok(None),
                () = &mut held => return Ok(Some(Disposition::Requeue)),
            };
            let answer = self.look_up(id).await;
            tracing::debug!(id, callback_id, ?answer, "looked up");
            // Waiting for the commit, or for a verdict, takes no lookup's place.
            let failure = place.leave(&outcome(&answer, delivery.failed_attempts()));
            let (error, failure) = match (answer, failure) {
                (Ok(Answer::Online(at)), _) => {
                    return Ok(Some(match self.writer.record(id, at).await? {
                        Written::Committed => Disposition::Ack,
                        Written::Refused(reason) => Disposition::DeadLetter { reason },
                    }));
                }
                (Ok(Answer::Offline), _) => return Ok(Some(Disposition::Ack)),
                (Err(error), failure) => (error, failure),
            };
            if self.breaker.is_closed() {
                self.failure_log.note(id, callback_id, &error);
            }
            let pause = error.asks_to_wait();
            // After a pause others come first, or one object that gets only 429 would be all there is.
            let wait = waits.next().unwrap_or_default() + pause.unwrap_or_default();
            let verdict = async {
                match failure {
                    Some(failure) if pause.is_none() => failure.verdict().await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                verdict = verdict => if verdict == Verdict::Counts {
                    return Ok(Some(self.after_failure(id, delivery, &error)));
                },
                () = sleep(wait) => {}
                () = self.shutdown.cancelled() => return Ok(None),
                () = &mut held => return Ok(Some(Disposition::Requeue)),
            }
        }
    }

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
        Disposition::Retry { reason, after: error.retry_after() }
    }
}

/// What an answer says about the API, given how often lookups for the same delivery have failed and
/// counted.
fn outcome(answer: &Result<Answer, LookupError>, failed_attempts: u32) -> Outcome<'_> {
    match answer {
        Ok(_) => Outcome::Answered,
        Err(error) => match error.asks_to_wait() {
            Some(wait) => Outcome::AskedToWait(wait),
            None if failed_attempts > 0 => Outcome::FailedAgain(error),
            None => Outcome::Failed(error),
        },
    }
}

/// How long a failed lookup waits when nothing tells whose fault it was.
fn waits_between_lookups() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_secs(1))
        .with_max_delay(Duration::from_secs(2))
        .with_jitter()
        .without_max_times()
        .build()
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

    fn note(&self, id: i64, callback_id: &str, error: &LookupError) {
        let reason = error.to_string();
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
