//! From a delivery to its settlement.

mod failure_log;
mod pending;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use broker::{Consumer, Delivery, Destination, Disposition};
use futures_util::future::join_all;
use service::traces::{KeyValue, Span, SpanKind, Step};
use service::{CancellationToken, Live};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, sleep};

use crate::breaker::{Breaker, Outcome, Place, Verdict, blames_object};
use crate::config::Lookups;
use crate::resizable_semaphore::{Permit, Room};
use crate::status_api::{Answer, LookupError, NOT_FOUND_METRIC, StatusApi};
use crate::writer::{Writer, WriterDied, Written};
use failure_log::FailureLog;
use pending::{Taken, Turn, Waiting};

// Decision: docs/decisions/0031-how-long-does-a-consumer-hold-a-delivery.md
/// A delivery whose lookup has failed is kept for another one for as long as so many may take, and then
/// sent to the end of the queue, and so is what waits for a lookup while the API is away for so long: maybe
/// another consumer has a better way to the API.
const LOOKUPS_HELD: u32 = 6;
/// At most so long a delivery waits for its lookup, and again for as long is kept when that has failed:
/// RabbitMQ ends the session of a consumer that holds a message for 30 minutes.
const HELD_MAX: Duration = Duration::from_mins(10);
/// How often it is seen to that none waits for longer.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// Takes deliveries, and runs as many lookups at once as the breaker lets.
pub(crate) struct Intake {
    lookups: Live<Lookups>,
    shared: Arc<Shared>,
}

/// What each lookup needs.
struct Shared {
    waiting: Waiting,
    /// Room for the objects whose lookup has begun and whose deliveries are not settled. While results
    /// cannot be written, this is what stops the lookups.
    begun: Arc<Room>,
    status_api: StatusApi,
    breaker: Arc<Breaker>,
    writer: Writer,
    destination: Destination,
    /// As they are now.
    lookups: watch::Sender<Lookups>,
    shutdown: CancellationToken,
    failure_log: FailureLog,
}

/// What the intake turns to.
enum Next {
    Taken(Taken),
    Changed(Lookups),
    Shutdown,
}

/// What a task comes to: the turn that it had, if it had one.
type Ended = Result<Option<Turn>, WriterDied>;

/// What has come of the lookup for some deliveries of an object.
enum Told {
    /// Online and committed, or offline.
    Settled,
    Refused(String),
    /// It failed, and that counts.
    /// It comes with the share of the other objects' lookups that failed at that time.
    Failed(LookupError, f64),
    /// It was looked up, or its row was tried, in vain for so long that the deliveries go back to the
    /// end of the queue.
    Nothing,
    /// The process drains before that is known.
    Draining,
}

impl Intake {
    pub(crate) fn new(
        lookups: Live<Lookups>,
        status_api: StatusApi,
        breaker: Arc<Breaker>,
        writer: Writer,
        destination: Destination,
        shutdown: CancellationToken,
    ) -> Self {
        describe_metrics();
        let config = lookups.now();
        let shared = Shared {
            waiting: Waiting::new(config.coalesce),
            begun: Room::new(config.begun_max().into()),
            status_api,
            breaker,
            writer,
            destination,
            lookups: watch::Sender::new(config),
            shutdown,
            failure_log: FailureLog::default(),
        };
        Self { lookups, shared: Arc::new(shared) }
    }

    /// Looks up what is delivered until the shutdown, then gives back what waits for a lookup, and
    /// finishes those that run.
    ///
    /// # Errors
    /// When a part that the lookups need has died: deliveries would stay unsettled for as long as this
    /// process lives, so the process must not.
    pub(crate) async fn run(self, mut deliveries: Consumer) -> anyhow::Result<()> {
        let Self { lookups: mut settings, shared } = self;
        // The prefetch bounds them too, but each session of the broker's anew.
        let unsettled = Room::new(shared.lookups.borrow().prefetch().into());
        let mut lookups = JoinSet::new();
        let mut begin = pin!(shared.begin());
        let mut away = pin!(shared.breaker.stays_open(shared.held_max()));
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        loop {
            let next = {
                let mut taken = pin!(Taken::next(&mut deliveries, &unsettled));
                loop {
                    // While it is not waited for, it must keep neither a place nor its turn to get one:
                    // others wait for them, whose lookups are made again.
                    let has_turns = shared.waiting.has_turns();
                    if !has_turns {
                        begin.set(shared.begin());
                    }
                    tokio::select! {
                        (room, place) = &mut begin, if has_turns => {
                            begin.set(shared.begin());
                            // With what waits for it, or that could be given back before it runs.
                            if let Some((turn, group)) = shared.waiting.next_turn() {
                                let shared = Arc::clone(&shared);
                                lookups.spawn(look_up_and_settle(shared, turn, group, place, room));
                            }
                        }
                        Some(lookup) = lookups.join_next() => shared.ended(lookup)?,
                        taken = &mut taken => break Next::Taken(taken),
                        changed = settings.changed() => break Next::Changed(changed),
                        () = &mut away => {
                            away.set(shared.breaker.stays_open(shared.held_max()));
                            shared.requeue_older_than(Instant::now(), &mut lookups);
                        }
                        now = look.tick() => if let Some(long_ago) = now.checked_sub(HELD_MAX) {
                            shared.requeue_older_than(long_ago, &mut lookups);
                        },
                        () = shared.shutdown.cancelled() => break Next::Shutdown,
                    }
                }
            };
            let mut taken = match next {
                Next::Taken(taken) => taken,
                Next::Changed(changed) => {
                    let prefetch = shared.change(&changed);
                    away.set(shared.breaker.stays_open(shared.held_max()));
                    unsettled.resize(prefetch.into());
                    begin.set(shared.begin());
                    tokio::select! {
                        () = deliveries.set_prefetch(prefetch) => continue,
                        () = shared.shutdown.cancelled() => break,
                    }
                }
                Next::Shutdown => break,
            };
            let delivery = &taken.delivery;
            taken.span = Span::begin(|| delivery.traceparent(), || shared.processing(delivery));
            match taken.delivery.id() {
                Ok(id) => shared.waiting.add(id, taken),
                Err(error) => {
                    tracing::warn!(%error, "a message that cannot be read goes to the dead letters");
                    let reason = error.to_string();
                    lookups.spawn(settle(taken, Disposition::DeadLetter { reason }));
                }
            }
        }
        deliveries.stop().await;
        let waiting = shared.waiting.take_older_than(Instant::now());
        join_all(waiting.into_iter().map(|taken| taken.delivery.give_back())).await;
        if !lookups.is_empty() {
            tracing::info!(lookups = lookups.len(), "finishing the lookups in flight");
        }
        while let Some(lookup) = lookups.join_next().await {
            shared.ended(lookup)?;
        }
        deliveries.close().await;
        Ok(())
    }
}

/// Looks up an object that deliveries wait for, has the result committed, and settles them.
async fn look_up_and_settle(
    shared: Arc<Shared>,
    turn: Turn,
    mut group: Vec<Taken>,
    place: Place,
    room: Permit,
) -> Ended {
    let mut room = Some(room);
    let told = shared.look_up_until_it_tells(&turn, place, &mut group, &mut room).await?;
    let settling = group.into_iter().map(async |taken| {
        let disposition = match &told {
            Told::Settled => Disposition::Ack,
            Told::Refused(reason) => Disposition::DeadLetter { reason: reason.clone() },
            Told::Failed(error, failing_share) => {
                shared.after_failure(turn.id, &taken.delivery, error, *failing_share)
            }
            Told::Nothing => Disposition::Requeue,
            Told::Draining => return taken.delivery.give_back().await,
        };
        _ = settle(taken, disposition).await;
    });
    join_all(settling).await;
    drop(room);
    Ok(Some(turn))
}

async fn settle(taken: Taken, disposition: Disposition) -> Ended {
    let Taken { delivery, room, mut span, .. } = taken;
    if let Disposition::Retry { reason, .. } | Disposition::DeadLetter { reason } = &disposition {
        span.fail(reason);
    }
    let id = delivery.id().ok();
    let callback_id = delivery.callback_id().to_owned();
    let settled = delivery.settle(disposition).await;
    drop(room);
    tracing::debug!(id, callback_id, ?settled, "settled");
    Ok(None)
}

impl Shared {
    /// Heeds settings that have changed, and gives the new prefetch.
    fn change(&self, now: &Lookups) -> u16 {
        let changed = self.lookups.borrow().changed_to(now);
        self.lookups.send_replace(changed.clone());
        self.begun.resize(changed.begun_max().into());
        self.breaker.change_to(&changed);
        changed.prefetch()
    }

    fn held_max(&self) -> Duration {
        self.lookups.borrow().status_timeout.saturating_mul(LOOKUPS_HELD).min(HELD_MAX)
    }

    /// Waits until another lookup may begin.
    async fn begin(&self) -> (Permit, Place) {
        let room = self.begun.enter().await;
        (room, self.breaker.enter().await)
    }

    /// Sends what has waited since before `moment` for its first lookup to the end of the queue.
    fn requeue_older_than(&self, moment: Instant, lookups: &mut JoinSet<Ended>) {
        for taken in self.waiting.take_older_than(moment) {
            lookups.spawn(settle(taken, Disposition::Requeue));
        }
    }

    /// Something has come to its end: whoever waits for its object has a turn again.
    fn ended(&self, ended: Result<Ended, JoinError>) -> anyhow::Result<()> {
        if let Some(turn) = ended.context("a lookup panicked")?? {
            self.waiting.end(turn);
        }
        Ok(())
    }

    /// Looks the object up, and again for as long as a failure may be nobody's but the API's. What
    /// has come for the object meanwhile joins `group` just before each lookup, so that none shares
    /// one that had begun before it was delivered.
    async fn look_up_until_it_tells(
        &self,
        turn: &Turn,
        mut place: Place,
        group: &mut Vec<Taken>,
        room: &mut Option<Permit>,
    ) -> Result<Told, WriterDied> {
        let id = turn.id;
        let mut held = pin!(sleep(self.held_max()));
        let mut waits = waits_between_lookups();
        let mut is_first = true;
        loop {
            self.waiting.join(turn, group);
            let answer = self.look_up(id, group).await;
            let callback_id = group.first().map_or("", |first| first.delivery.callback_id());
            tracing::debug!(id, callback_id, deliveries = group.len(), ?answer, "looked up");
            // Waiting for the commit, or for a verdict, takes no lookup's place.
            let has_failed = group.iter().any(|taken| taken.delivery.failed_attempts() > 0);
            if std::mem::take(&mut is_first) && !has_failed && !is_asked_to_wait(&answer) {
                self.breaker.note_first(id, answer.is_ok());
            }
            let failure = place.leave(&outcome(&answer, has_failed));
            let (error, failure) = match (answer, failure) {
                (Ok(Answer::Online(at)), _) => {
                    let commit = Span::joint(group.iter().map(|taken| &taken.span), committing);
                    let mut recording = self.writer.record(id, at, commit).await?;
                    let written = if let Some(written) = recording.written_or_set_aside().await? {
                        written
                    } else {
                        // A row that is held up keeps no other lookup from beginning.
                        drop(room.take());
                        tokio::select! {
                            written = recording.written() => written?,
                            () = self.shutdown.cancelled() => return Ok(Told::Draining),
                        }
                    };
                    return Ok(match written {
                        Written::Committed => {
                            record_ages(group);
                            Told::Settled
                        }
                        Written::Refused(reason) => Told::Refused(reason),
                        Written::Postponed => Told::Nothing,
                    });
                }
                (Ok(Answer::Offline), _) => return Ok(Told::Settled),
                (Err(error), failure) => (error, failure),
            };
            let failing_share = self.breaker.failing_share(id);
            if self.breaker.is_closed() {
                self.failure_log.note(id, callback_id, &error);
            }
            let pause = error.asks_to_wait();
            // After a pause others come first, or one object that gets only 429 would be all there is.
            let wait = waits.next().unwrap_or_default().saturating_add(pause.unwrap_or_default());
            let verdict = async {
                match failure {
                    Some(failure) if pause.is_none() => failure.verdict().await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                verdict = verdict => if verdict == Verdict::Counts {
                    return Ok(Told::Failed(error, failing_share));
                },
                () = sleep(wait) => {}
                () = self.shutdown.cancelled() => return Ok(Told::Draining),
                () = &mut held => return Ok(Told::Nothing),
            }
            place = tokio::select! {
                // In this order, or a place that is there already would be lost for a moment.
                biased;
                place = self.breaker.enter() => place,
                () = self.shutdown.cancelled() => return Ok(Told::Draining),
                () = &mut held => return Ok(Told::Nothing),
            };
        }
    }

    async fn look_up(&self, id: i64, group: &[Taken]) -> Result<Answer, LookupError> {
        let deliveries = group.iter().map(|taken| &taken.span);
        let mut span = Span::joint(deliveries, || self.status_api.step(id));
        let in_flight = metrics::gauge!("lastseen_lookups_in_flight");
        in_flight.increment(1.0);
        let started = Instant::now();
        let lookups = self.lookups.borrow().clone();
        let answer = self.status_api.look_up(id, &lookups, &mut span).await;
        in_flight.decrement(1.0);
        metrics::histogram!("lastseen_lookup_seconds").record(started.elapsed());
        let outcome = match &answer {
            Ok(Answer::Online(_)) => "online",
            Ok(Answer::Offline) => "offline",
            Err(error) => {
                span.set("error.type", error.label());
                span.fail(error);
                error.label()
            }
        };
        metrics::counter!("lastseen_lookups_total", "outcome" => outcome).increment(1);
        answer
    }

    /// What is done about a delivery, as traces have it.
    fn processing(&self, delivery: &Delivery) -> Step {
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

    fn after_failure(
        &self,
        id: i64,
        delivery: &Delivery,
        error: &LookupError,
        failing_share: f64,
    ) -> Disposition {
        // The count comes with the message.
        let attempts = delivery.failed_attempts().saturating_add(1);
        let callback_id = delivery.callback_id();
        let reason = error.to_string();
        if attempts >= self.lookups.borrow().max_attempts {
            // As it was then and as it is now: the last failures of an outage are judged after its end.
            let failing_share = failing_share.max(self.breaker.failing_share(id));
            if blames_object(failing_share, attempts) {
                tracing::warn!(id, callback_id, attempts, reason, "given up; now a dead letter");
                return Disposition::DeadLetter { reason };
            }
            tracing::debug!(id, callback_id, attempts, reason, "kept: other lookups fail as well");
        }
        Disposition::Retry { reason, after: error.retry_after() }
    }
}

/// The wait for a commit, as traces have it.
fn committing() -> Step {
    Step { name: "commit".into(), kind: SpanKind::Internal, attributes: Vec::new() }
}

/// What an answer says about the API, given whether lookups of the object have failed before and counted.
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

/// How long a failed lookup waits when nothing tells whose fault it was.
fn waits_between_lookups() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_secs(1))
        .with_max_delay(Duration::from_secs(2))
        .with_jitter()
        .without_max_times()
        .build()
}

/// Records how long ago the callbacks came in whose objects are committed now.
fn record_ages(group: &[Taken]) {
    for accepted_at in group.iter().filter_map(|taken| taken.delivery.accepted_at()) {
        // The producer's clock may be ahead of ours.
        let age = accepted_at.elapsed().unwrap_or_default();
        metrics::histogram!("lastseen_callback_to_commit_seconds").record(age);
    }
}

fn describe_metrics() {
    metrics::describe_counter!("lastseen_lookups_total", "Lookups by outcome.");
    for outcome in ["online", "offline"].into_iter().chain(LookupError::LABELS) {
        metrics::counter!("lastseen_lookups_total", "outcome" => outcome).increment(0);
    }
    metrics::describe_counter!(
        NOT_FOUND_METRIC,
        "Lookups answered with 404, whether that says offline or is a failure."
    );
    metrics::counter!(NOT_FOUND_METRIC).increment(0);
    metrics::describe_histogram!(
        "lastseen_callback_to_commit_seconds",
        metrics::Unit::Seconds,
        "Time from a callback to the commit of an object that was online, for each message."
    );
    metrics::describe_gauge!("lastseen_lookups_in_flight", "Lookups running now.");
    metrics::gauge!("lastseen_lookups_in_flight").set(0);
    metrics::describe_histogram!(
        "lastseen_lookup_seconds",
        metrics::Unit::Seconds,
        "Time that a lookup took, whatever its outcome."
    );
}
