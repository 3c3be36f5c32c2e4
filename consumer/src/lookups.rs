//! Looks up the objects of deliveries, and settles the deliveries.

mod lookup_metrics;
mod pending;

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use futures_util::future::join_all;
use messaging::events::{Emitter, GivenUp};
use messaging::queue::{Consumer, Delivery, Destination, Disposition, Prefetch, Settled};
use runtime::traces::{KeyValue, Span, SpanKind, Step};
use runtime::{CancellationToken, LogLimiter, Reloadable};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, Interval, sleep};
use tokio_util::sync::ReusableBoxFuture;

use crate::backoff;
use crate::breaker::{Breaker, LookupPermit, Outcome, Verdict, is_object_at_fault};
use crate::config::Lookups;
use crate::resizable_semaphore::{Permit, ResizableSemaphore};
use crate::status_api::{Answer, LookupError, StatusApi};
use crate::writer::{WriteOutcome, Writer, WriterStopped};
use lookup_metrics::LookupMetrics;
use pending::{LookupKey, PendingDeliveries, PendingDelivery};

// Decision: docs/decisions/0031-how-long-does-a-consumer-hold-a-delivery.md
/// After a failed lookup, a consumer holds the delivery and repeats the lookup, until
/// `HELD_TIMEOUTS` times `STATUS_TIMEOUT` have passed. Then it sends the message to the end of the
/// queue, because another consumer may reach the API. The same applies to a delivery that waits for
/// a lookup while the breaker is open.
const HELD_TIMEOUTS: u32 = 6;
/// The longest time that a delivery waits for its first lookup, and the longest time that it is
/// held after a failed lookup. RabbitMQ ends the session of a consumer that holds a message for 30
/// minutes.
const HELD_MAX: Duration = Duration::from_mins(10);
/// How often the scheduler checks for deliveries that have waited for [`HELD_MAX`].
const AGE_CHECK_INTERVAL: Duration = Duration::from_secs(30);
/// The time between two log lines about failed lookups. During an outage of the API, hundreds of
/// lookups per second fail for the same reason.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(5);

/// Takes deliveries, and keeps as many lookups in flight as the breaker allows.
pub(crate) struct LookupScheduler {
    settings: Reloadable<Lookups>,
    context: Arc<LookupContext>,
    /// Permits for all deliveries that are not settled. The prefetch limits them too, but for each
    /// broker session separately.
    unsettled_deliveries: Arc<ResizableSemaphore>,
    /// Tokio tasks: lookups, and settlements of deliveries without a lookup.
    tasks: JoinSet<TaskResult>,
    /// Acquires the permits for the next lookup.
    next_permits: ReusableBoxFuture<'static, (Permit, LookupPermit)>,
    /// Resolves when the breaker has been open for as long as a delivery may be held.
    open_too_long: ReusableBoxFuture<'static, ()>,
    age_check: Interval,
}

struct LookupContext {
    pending: PendingDeliveries,
    /// Permits for the objects whose lookup has started and whose deliveries are not settled. While
    /// results cannot be written, no permit is free, so no further lookup starts.
    unsettled_lookups: Arc<ResizableSemaphore>,
    status_api: StatusApi,
    breaker: Arc<Breaker>,
    writer: Writer,
    events: Emitter,
    destination: Destination,
    lookups: watch::Sender<Lookups>,
    shutdown: CancellationToken,
    failure_log: LogLimiter,
    metrics: LookupMetrics,
}

/// The events that [`LookupScheduler::run`] handles. `next_event` handles all others itself,
/// without giving up its wait for a delivery.
enum Event {
    Delivery(PendingDelivery),
    SettingsChanged(Lookups),
    Shutdown,
}

/// The lookup that a task has finished, if it ran one.
type TaskResult = Result<Option<LookupKey>, WriterStopped>;

/// The result of an object's lookups, for all deliveries that share them.
enum LookupResult {
    /// The object is online and its row is committed, or the object is offline.
    Resolved,
    /// The database refused the row, for this reason.
    RowRefused(String),
    /// The lookup failed, and this counts as an attempt.
    Failed {
        error: LookupError,
        /// The share of the other objects' recent first lookups that had failed by then.
        failing_share: f64,
    },
    /// The deliveries have been held too long without a result; they go to the end of the queue.
    Unresolved,
    /// The process drains, and the result is not known yet.
    Draining,
}

impl LookupScheduler {
    pub(crate) fn new(
        settings: Reloadable<Lookups>,
        status_api: StatusApi,
        breaker: Arc<Breaker>,
        writer: Writer,
        events: Emitter,
        destination: Destination,
        shutdown: CancellationToken,
    ) -> Self {
        let lookups = settings.current();
        let unsettled_deliveries = ResizableSemaphore::new(lookups.prefetch().total().into());
        let context = Arc::new(LookupContext {
            pending: PendingDeliveries::new(lookups.coalesce),
            unsettled_lookups: ResizableSemaphore::new(lookups.unsettled_lookups_max().into()),
            status_api,
            breaker,
            writer,
            events,
            destination,
            lookups: watch::Sender::new(lookups),
            shutdown,
            failure_log: LogLimiter::new(FAILURE_LOG_INTERVAL),
            metrics: LookupMetrics::register(),
        });
        Self {
            settings,
            unsettled_deliveries,
            tasks: JoinSet::new(),
            next_permits: ReusableBoxFuture::new(acquire_permits(Arc::clone(&context))),
            open_too_long: ReusableBoxFuture::new(open_too_long(Arc::clone(&context))),
            age_check: tokio::time::interval(AGE_CHECK_INTERVAL),
            context,
        }
    }

    /// Looks up the objects of all deliveries until the shutdown, then drains.
    ///
    /// # Errors
    /// When a component that the lookups need has stopped. The process must end then, because the
    /// broker delivers unsettled messages again only after that.
    pub(crate) async fn run(mut self, mut deliveries: Consumer) -> anyhow::Result<()> {
        loop {
            match self.next_event(&mut deliveries).await? {
                Event::Delivery(pending) => self.accept(pending),
                Event::SettingsChanged(settings) => {
                    let prefetch = self.apply_settings(&settings);
                    tokio::select! {
                        () = deliveries.set_prefetch(prefetch) => {}
                        () = self.context.shutdown.cancelled() => break,
                    }
                }
                Event::Shutdown => break,
            }
        }
        self.drain(deliveries).await
    }

    /// Starts and finishes lookups until the next event. Polls one future for the next delivery
    /// until then, because a new future would begin again to connect to the broker.
    async fn next_event(&mut self, deliveries: &mut Consumer) -> anyhow::Result<Event> {
        let unsettled = Arc::clone(&self.unsettled_deliveries);
        let mut delivery = pin!(PendingDelivery::receive(deliveries, &unsettled));
        loop {
            let has_next = self.context.pending.has_next();
            if !has_next {
                self.release_permits();
            }
            tokio::select! {
                permits = &mut self.next_permits, if has_next => self.start_lookup(permits),
                Some(task) = self.tasks.join_next() => self.finish(task)?,
                delivery = &mut delivery => return Ok(Event::Delivery(delivery)),
                settings = self.settings.changed() => return Ok(Event::SettingsChanged(settings)),
                () = &mut self.open_too_long => self.requeue_all(),
                now = self.age_check.tick() => self.requeue_overdue(now),
                () = self.context.shutdown.cancelled() => return Ok(Event::Shutdown),
            }
        }
    }

    /// Starts the next lookup, unless the deliveries that wait for it were lost or given back.
    fn start_lookup(&mut self, (unsettled, lookup): (Permit, LookupPermit)) {
        self.release_permits();
        if let Some((key, group)) = self.context.pending.take_next() {
            let context = Arc::clone(&self.context);
            self.tasks.spawn(look_up_and_settle(context, key, group, lookup, unsettled));
        }
    }

    /// Releases the permits for the next lookup, to acquire them again later. Without a lookup to
    /// start, the scheduler must not keep permits or its position in the line for them, because
    /// repeated lookups wait for the same permits.
    fn release_permits(&mut self) {
        self.next_permits.set(acquire_permits(Arc::clone(&self.context)));
    }

    /// Ends the lookup of a finished task. Deliveries that have arrived for its object meanwhile
    /// get another lookup.
    fn finish(&self, task: Result<TaskResult, JoinError>) -> anyhow::Result<()> {
        if let Some(key) = task.context("a lookup panicked")?? {
            self.context.pending.finish(key);
        }
        Ok(())
    }

    /// Queues the delivery for a lookup.
    fn accept(&mut self, mut pending: PendingDelivery) {
        let delivery = &pending.delivery;
        pending.span =
            Span::begin(|| delivery.traceparent(), || self.context.delivery_step(delivery));
        match pending.delivery.id() {
            Ok(id) => self.context.pending.add(id, pending),
            Err(error) => {
                tracing::warn!(%error, "cannot decode a message; it becomes a dead letter");
                let reason = error.to_string();
                self.settle_without_lookup(pending, Disposition::DeadLetter { reason });
            }
        }
    }

    fn settle_without_lookup(&mut self, pending: PendingDelivery, disposition: Disposition) {
        self.tasks.spawn(async {
            settle(pending, disposition).await;
            Ok(None)
        });
    }

    /// Applies the settings in `new` that are reloadable, and returns the new prefetch.
    fn apply_settings(&mut self, new: &Lookups) -> Prefetch {
        let lookups = self.context.lookups.borrow().with_reloadable(new);
        self.context.lookups.send_replace(lookups.clone());
        self.context.unsettled_lookups.resize(lookups.unsettled_lookups_max().into());
        self.context.breaker.apply_settings(&lookups);
        let prefetch = lookups.prefetch();
        self.open_too_long.set(open_too_long(Arc::clone(&self.context)));
        self.unsettled_deliveries.resize(prefetch.total().into());
        self.release_permits();
        prefetch
    }

    /// Sends all deliveries that wait for their first lookup to the end of the queue.
    fn requeue_all(&mut self) {
        self.open_too_long.set(open_too_long(Arc::clone(&self.context)));
        self.requeue_older_than(Instant::now());
    }

    fn requeue_overdue(&mut self, now: Instant) {
        if let Some(moment) = now.checked_sub(HELD_MAX) {
            self.requeue_older_than(moment);
        }
    }

    fn requeue_older_than(&mut self, moment: Instant) {
        for pending in self.context.pending.take_older_than(moment) {
            self.settle_without_lookup(pending, Disposition::Requeue);
        }
    }

    /// Gives back the deliveries that wait for a lookup, and finishes the lookups in flight.
    async fn drain(mut self, mut deliveries: Consumer) -> anyhow::Result<()> {
        deliveries.stop().await;
        let waiting = self.context.pending.take_older_than(Instant::now());
        join_all(waiting.into_iter().map(|pending| pending.delivery.give_back())).await;
        if !self.tasks.is_empty() {
            tracing::info!(lookups = self.tasks.len(), "finishing the lookups in flight");
        }
        while let Some(task) = self.tasks.join_next().await {
            self.finish(task)?;
        }
        deliveries.close().await;
        Ok(())
    }
}

async fn acquire_permits(context: Arc<LookupContext>) -> (Permit, LookupPermit) {
    let unsettled = context.unsettled_lookups.acquire().await;
    (unsettled, context.breaker.acquire().await)
}

fn open_too_long(context: Arc<LookupContext>) -> impl Future<Output = ()> {
    let limit = context.held_max();
    async move { context.breaker.stays_open(limit).await }
}

/// Looks up the object of `group`, waits for the commit of the result, and settles the deliveries.
async fn look_up_and_settle(
    context: Arc<LookupContext>,
    key: LookupKey,
    mut group: Vec<PendingDelivery>,
    permit: LookupPermit,
    unsettled: Permit,
) -> TaskResult {
    let mut unsettled = Some(unsettled);
    let result = context.resolve_status(key, permit, &mut group, &mut unsettled).await?;
    let settling = group.into_iter().map(async |pending| {
        let disposition = match &result {
            LookupResult::Resolved => Disposition::Ack,
            LookupResult::RowRefused(reason) => Disposition::DeadLetter { reason: reason.clone() },
            LookupResult::Failed { error, failing_share } => {
                context.after_failure(key.id, &pending.delivery, error, *failing_share)
            }
            LookupResult::Unresolved => Disposition::Requeue,
            LookupResult::Draining => {
                pending.delivery.give_back().await;
                return false;
            }
        };
        let gives_up = matches!(disposition, Disposition::DeadLetter { .. });
        settle(pending, disposition).await == Settled::Done && gives_up
    });
    // The dead letters are stored by now, so that a subscriber of the event finds them.
    if join_all(settling).await.contains(&true) {
        context.events.publish_given_up(GivenUp { id: key.id, at: SystemTime::now() });
    }
    drop(unsettled);
    Ok(Some(key))
}

async fn settle(pending: PendingDelivery, disposition: Disposition) -> Settled {
    let PendingDelivery { delivery, permit, mut span, .. } = pending;
    if let Disposition::Retry { reason, .. } | Disposition::DeadLetter { reason } = &disposition {
        span.fail(reason);
    }
    let id = delivery.id().ok();
    let callback_id = delivery.callback_id().to_owned();
    let settled = delivery.settle(disposition).await;
    drop(permit);
    tracing::debug!(id, callback_id, ?settled, "settled");
    settled
}

impl LookupContext {
    fn held_max(&self) -> Duration {
        self.lookups.borrow().status_timeout.saturating_mul(HELD_TIMEOUTS).min(HELD_MAX)
    }

    /// Looks the object up. After a failure, repeats the lookup unless the failure counts as an
    /// attempt. Just before each lookup, adds the deliveries of the object that have arrived to
    /// `group`. No delivery gets the result of a lookup that started before the delivery arrived.
    async fn resolve_status(
        &self,
        key: LookupKey,
        mut permit: LookupPermit,
        group: &mut Vec<PendingDelivery>,
        unsettled: &mut Option<Permit>,
    ) -> Result<LookupResult, WriterStopped> {
        let id = key.id;
        let mut held_too_long = pin!(sleep(self.held_max()));
        // How long to wait for the verdict on a failed lookup before the lookup is repeated.
        let mut waits = backoff(Duration::from_secs(1), Duration::from_secs(2));
        let mut is_first = true;
        loop {
            self.pending.join(key, group);
            let answer = self.look_up(id, group).await;
            let callback_id = group.first().map_or("", |first| first.delivery.callback_id());
            tracing::debug!(id, callback_id, deliveries = group.len(), ?answer, "looked up");
            let has_failed = group.iter().any(|pending| pending.delivery.failed_attempts() > 0);
            if std::mem::take(&mut is_first) && !has_failed && !is_asked_to_wait(&answer) {
                self.breaker.record_first_lookup(id, answer.is_ok());
            }
            // Release the permit before waiting for a commit or for a verdict.
            let failure = permit.complete(&outcome(&answer, has_failed));
            let error = match answer {
                Ok(Answer::Online(at)) => {
                    return self.commit_sighting(id, at, group, unsettled).await;
                }
                Ok(Answer::Offline) => return Ok(LookupResult::Resolved),
                Err(error) => error,
            };
            let failing_share = self.breaker.failing_share(id);
            if self.breaker.is_closed()
                && let Some(count) = self.failure_log.count()
            {
                let reason = error.to_string();
                tracing::warn!(
                    count,
                    id,
                    callback_id,
                    reason,
                    "lookups failed and will be retried; this line shows the latest one"
                );
            }
            let pause = error.asks_to_wait();
            // Wait for longer than the pause, so that other objects are looked up first. Otherwise,
            // an object that always gets a 429 would be the only one that is looked up.
            let wait = waits.next().unwrap_or_default().saturating_add(pause.unwrap_or_default());
            let verdict = async {
                match failure {
                    Some(failure) if pause.is_none() => {
                        self.breaker.wait_for_verdict(failure).await
                    }
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                verdict = verdict => if verdict == Verdict::Counts {
                    return Ok(LookupResult::Failed { error, failing_share });
                },
                () = sleep(wait) => {}
                () = self.shutdown.cancelled() => return Ok(LookupResult::Draining),
                () = &mut held_too_long => return Ok(LookupResult::Unresolved),
            }
            permit = tokio::select! {
                // If the permit is ready, take it before checking the other events: until it is
                // taken, no other lookup can use it.
                biased;
                permit = self.breaker.acquire() => permit,
                () = self.shutdown.cancelled() => return Ok(LookupResult::Draining),
                () = &mut held_too_long => return Ok(LookupResult::Unresolved),
            };
        }
    }

    /// Writes that the object was online at `at`, and waits for the commit.
    async fn commit_sighting(
        &self,
        id: i64,
        at: std::time::Instant,
        group: &[PendingDelivery],
        unsettled: &mut Option<Permit>,
    ) -> Result<LookupResult, WriterStopped> {
        let span = Span::joint(group.iter().map(|pending| &pending.span), || Step {
            name: "commit".into(),
            kind: SpanKind::Internal,
            attributes: Vec::new(),
        });
        let mut write = self.writer.record(id, at, span).await?;
        let outcome = if let Some(outcome) = write.outcome_or_set_aside().await? {
            outcome
        } else {
            // A held-up row must not prevent other lookups from starting.
            drop(unsettled.take());
            tokio::select! {
                outcome = write.outcome() => outcome?,
                () = self.shutdown.cancelled() => return Ok(LookupResult::Draining),
            }
        };
        Ok(match outcome {
            WriteOutcome::Committed => {
                let accepted = group.iter().filter_map(|pending| pending.delivery.accepted_at());
                self.metrics.record_commit(accepted);
                LookupResult::Resolved
            }
            WriteOutcome::Refused(reason) => LookupResult::RowRefused(reason),
            WriteOutcome::Postponed => LookupResult::Unresolved,
        })
    }

    async fn look_up(&self, id: i64, group: &[PendingDelivery]) -> Result<Answer, LookupError> {
        let deliveries = group.iter().map(|pending| &pending.span);
        let mut span = Span::joint(deliveries, || self.status_api.step(id));
        let started = self.metrics.start_lookup();
        let (limit, status_404) = {
            let lookups = self.lookups.borrow();
            (lookups.status_timeout, lookups.status_404)
        };
        let answer = self.status_api.look_up(id, limit, status_404, &mut span).await;
        if let Err(error) = &answer {
            span.set("error.type", error.label());
            span.fail(error);
        }
        self.metrics.finish_lookup(started, &answer);
        answer
    }

    /// The span of a delivery, from its arrival to its settlement.
    fn delivery_step(&self, delivery: &Delivery) -> Step {
        let Destination { system, name } = &self.destination;
        let mut attributes = vec![
            KeyValue::new("messaging.system", *system),
            KeyValue::new("messaging.destination.name", name.clone()),
            KeyValue::new("messaging.operation.name", "process"),
            KeyValue::new("messaging.operation.type", "process"),
            KeyValue::new("messaging.message.conversation_id", delivery.callback_id().to_owned()),
            KeyValue::new("lastseen.failed_attempts", i64::from(delivery.failed_attempts())),
        ];
        attributes.extend(delivery.id().map(|id| KeyValue::new("lastseen.object_id", id)));
        Step { name: format!("process {name}").into(), kind: SpanKind::Consumer, attributes }
    }

    /// How to settle a delivery whose lookup failed, if the failure counts as an attempt.
    fn after_failure(
        &self,
        id: i64,
        delivery: &Delivery,
        error: &LookupError,
        failing_share: f64,
    ) -> Disposition {
        let attempts = delivery.failed_attempts().saturating_add(1);
        let callback_id = delivery.callback_id();
        let reason = error.to_string();
        if attempts >= self.lookups.borrow().max_attempts {
            // Use the larger of the share at the failure and the share now: the verdicts on the
            // last failures of an outage come after its end.
            let failing_share = failing_share.max(self.breaker.failing_share(id));
            if is_object_at_fault(failing_share, attempts) {
                tracing::warn!(
                    id,
                    callback_id,
                    attempts,
                    reason,
                    "the last attempt failed; the message becomes a dead letter"
                );
                return Disposition::DeadLetter { reason };
            }
            tracing::debug!(
                id,
                callback_id,
                attempts,
                reason,
                "retrying beyond MAX_ATTEMPTS, because lookups of other objects fail as well"
            );
        }
        Disposition::Retry { reason, after: error.retry_after() }
    }
}

/// What an answer says about the API. `has_failed` is true if an earlier lookup of the object
/// failed and counted.
fn outcome(answer: &Result<Answer, LookupError>, has_failed: bool) -> Outcome<'_> {
    match answer {
        Ok(_) => Outcome::Answered,
        Err(error) => match error.asks_to_wait() {
            Some(wait) => Outcome::AskedToWait(wait),
            None if has_failed => Outcome::FailedAgain(error),
            None => Outcome::Failed(error),
        },
    }
}

fn is_asked_to_wait(answer: &Result<Answer, LookupError>) -> bool {
    answer.as_ref().is_err_and(|error| error.asks_to_wait().is_some())
}
