//! Inspects the queues every few seconds on a consumer's connection: for the metrics, and to detect
//! that the broker delivers nothing although the queue is not empty.
//!
//! Decision: docs/decisions/0016-how-is-the-age-of-the-oldest-message-measured.md

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use lapin::types::ShortString;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::depths;
use super::expiry_check::ExpiryCheck;
use super::topology::Topology;
use super::unsettled::Unsettled;
use crate::amqp::{Connection, within_deadline};
use crate::queue::gauges::Gauges;

const INTERVAL: Duration = Duration::from_secs(2);
/// A queue answers at once if its node is connected to the others.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
// Decision: docs/decisions/0017-how-does-a-consumer-detect-starvation.md
/// RabbitMQ has lost a consumer after this many inspections in a row that found ready messages while
/// the consumer waited for a delivery and had free prefetch, or that found a queue with ready
/// messages but no consumer. RabbitMQ normally delivers a ready message at once.
const STARVING_AFTER: u32 = 5;

/// Inspects the queues until it is dropped at the end of the session.
pub(super) struct QueueMonitor {
    shared: Arc<Shared>,
    task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Shared {
    /// Incremented at the start and at the end of each wait, so it is odd while the consumer waits
    /// for a delivery.
    waits: AtomicU64,
    /// Inspections in a row that suggest starvation.
    starved_inspections: AtomicU32,
    /// Inspections in a row that found a queue without a consumer.
    inspections_without_consumer: AtomicU32,
    nothing_is_due: AtomicBool,
    queue_is_missing: AtomicBool,
    /// Whether the queue did not answer the last probe.
    is_cut_off: AtomicBool,
    /// The consumer's limit on unsettled deliveries.
    prefetch: AtomicUsize,
}

/// The queues that the monitor inspects.
struct Queues {
    topology: Arc<Topology>,
    further_shards: Vec<ShortString>,
}

/// Marks the consumer as waiting for a delivery until this is dropped.
pub(super) struct Wait(Arc<Shared>);

impl QueueMonitor {
    /// Starts inspecting the queues of `topology`, for a consumer with this prefetch. The monitor
    /// does not keep the connection open.
    pub(super) fn start(
        connection: &Arc<Connection>,
        topology: Arc<Topology>,
        further_shards: Vec<ShortString>,
        unsettled: Arc<Unsettled>,
        expiry: Arc<ExpiryCheck>,
        prefetch: u16,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        shared.prefetch.store(prefetch.into(), Ordering::Relaxed);
        let connection = Arc::downgrade(connection);
        let queues = Queues { topology, further_shards };
        let monitor = monitor(connection, queues, unsettled, expiry, Arc::clone(&shared));
        Self { shared, task: AbortOnDropHandle::new(tokio::spawn(monitor)) }
    }

    pub(super) fn set_prefetch(&self, prefetch: u16) {
        self.shared.prefetch.store(prefetch.into(), Ordering::Relaxed);
    }

    /// Begins a wait for a delivery. The consumer holds the result until it has a delivery.
    pub(super) fn start_wait(&self) -> Wait {
        self.shared.waits.fetch_add(1, Ordering::Relaxed);
        Wait(Arc::clone(&self.shared))
    }

    /// Whether the consumer has been waiting for long although the queue was never empty.
    pub(super) fn is_starving(&self) -> bool {
        self.shared.starved_inspections.load(Ordering::Relaxed) >= STARVING_AFTER
    }

    /// Whether RabbitMQ has lost all consumers of a queue that has messages, although this consumer
    /// consumes from it. Other queues may deliver meanwhile.
    pub(super) fn has_queue_without_consumer(&self) -> bool {
        self.shared.inspections_without_consumer.load(Ordering::Relaxed) >= STARVING_AFTER
    }

    pub(super) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Whether the main queue or a shard did not exist at the last inspection.
    pub(super) fn queue_is_missing(&self) -> bool {
        self.shared.queue_is_missing.load(Ordering::Relaxed)
    }

    /// Whether the main queue did not answer although the broker did. The broker's node is then cut
    /// off from the majority of the queue's members, and can deliver nothing.
    pub(super) fn is_cut_off(&self) -> bool {
        self.shared.is_cut_off.load(Ordering::Relaxed)
    }

    /// Whether the last inspection found no message that RabbitMQ has to deliver to this consumer.
    pub(super) fn nothing_is_due(&self) -> bool {
        self.shared.nothing_is_due.load(Ordering::Relaxed)
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.0.waits.fetch_add(1, Ordering::Relaxed);
    }
}

async fn monitor(
    connection: Weak<Connection>,
    Queues { topology, further_shards }: Queues,
    unsettled: Arc<Unsettled>,
    expiry: Arc<ExpiryCheck>,
    shared: Arc<Shared>,
) {
    let gauges = Gauges::new();
    let mut starvation = StarvationDetector::default();
    // When the queue was last found empty. All ready messages arrived later.
    let mut was_empty_at = None;
    let mut last_wait = 0;
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(connection) = connection.upgrade() else { return };
        let (inspected_at, wait) = (SystemTime::now(), shared.waits.load(Ordering::Relaxed));
        let same_wait = std::mem::replace(&mut last_wait, wait) == wait;
        let is_idle = same_wait && wait % 2 == 1 && unsettled.count() == 0;
        let (state, answers) = tokio::join!(
            within_deadline(topology.inspect(&connection, &further_shards)),
            // A consumer with deliveries needs no probe.
            async { !is_idle || queue_answers(&connection, &topology.queue).await }
        );
        shared.is_cut_off.store(!answers, Ordering::Relaxed);
        let state = match state {
            Ok(state) => state,
            // If the session has ended, the consumer notices it without the monitor. A failed
            // inspection does not show whether the consumer is starving.
            Err(error) => {
                tracing::debug!(error, "cannot inspect the queues");
                let count = starvation.record(wait, false);
                shared.starved_inspections.store(count, Ordering::Relaxed);
                continue;
            }
        };
        let depths = state.depths;
        let queue_is_missing =
            state.missing.iter().any(|queue| topology.is_work_queue(queue.as_str()));
        shared.queue_is_missing.store(queue_is_missing, Ordering::Relaxed);
        // Decision: docs/decisions/0003-when-is-a-vanished-queue-declared-again.md
        // No session consumes from the delay queues and the dead-letter queue, so the monitor
        // declares them again if one is missing. Only the next session declares a missing main
        // queue.
        if !queue_is_missing
            && !state.missing.is_empty()
            && let Err(error) = topology.declare(&connection).await
        {
            tracing::debug!(%error, "cannot declare the queues again");
        }
        if depths.ready == 0 {
            was_empty_at = Some(inspected_at);
        }
        let unsettled_count = unsettled.count();
        let is_sharded = !topology.shards.is_empty() || !further_shards.is_empty();
        let ready_since = match depths.ready {
            0 => None,
            // The ready messages may all belong to other consumers, which report their age.
            _ if is_sharded && unsettled_count == 0 => None,
            _ => unsettled.newest().max(was_empty_at),
        };
        let oldest = [unsettled.oldest(), ready_since].into_iter().flatten().min();
        gauges.set(depths, unsettled_count, oldest);
        // A shard's messages may all belong to another consumer.
        let for_this_consumer = if is_sharded { state.ready_in_main } else { depths.ready };
        let nothing_is_due = for_this_consumer == 0 && !state.lacks_consumer;
        shared.nothing_is_due.store(nothing_is_due, Ordering::Relaxed);
        let could_deliver =
            for_this_consumer > 0 && unsettled_count < shared.prefetch.load(Ordering::Relaxed);
        let starved_inspections = starvation.record(wait, could_deliver);
        shared.starved_inspections.store(starved_inspections, Ordering::Relaxed);
        let without_consumer = starvation.record_lack(wait, state.lacks_consumer);
        shared.inspections_without_consumer.store(without_consumer, Ordering::Relaxed);
        expiry.record_depth(&connection, &topology, depths.dead).await;
    }
}

// Decision: docs/decisions/0017-how-does-a-consumer-detect-starvation.md
/// Whether the queue responds to a `basic.get`. Unlike a passive declaration, it needs the majority
/// of the members of a quorum queue.
async fn queue_answers(connection: &Connection, queue: &ShortString) -> bool {
    let probe = async {
        let channel = connection.create_channel().await?;
        // A message can arrive in between. The broker then delivers it again.
        depths::count_ready(&channel, queue).await?;
        channel.close(200, "done".into()).await
    };
    match timeout(PROBE_TIMEOUT, probe).await {
        Ok(Ok(())) => true,
        // An error closes the channel, such as that the queue does not exist.
        Ok(Err(error)) => {
            tracing::debug!(%error, "cannot probe the queue");
            true
        }
        Err(_) => false,
    }
}

/// Counts the inspections in a row that found a message which the waiting consumer should have
/// received, and those that found a queue without a consumer.
#[derive(Default)]
struct StarvationDetector {
    wait: u64,
    inspections: u32,
    without_consumer: u32,
}

impl StarvationDetector {
    /// Records whether the broker could have delivered a message at this inspection, which took
    /// place during `wait`. Returns the count.
    fn record(&mut self, wait: u64, could_deliver: bool) -> u32 {
        let same_wait = std::mem::replace(&mut self.wait, wait) == wait;
        let is_waiting = wait % 2 == 1;
        self.inspections = match (is_waiting && could_deliver, same_wait) {
            (false, _) => 0,
            // The wait may have begun just now.
            (true, false) => 1,
            (true, true) => self.inspections + 1,
        };
        self.inspections
    }

    /// Records whether a queue had ready messages but no consumer at this inspection. Returns the
    /// count.
    ///
    /// Ignores inspections between two waits, when the consumer may be replacing its consumers. The
    /// count continues with the next wait, because other queues may deliver.
    fn record_lack(&mut self, wait: u64, lacks_consumer: bool) -> u32 {
        let is_waiting = wait % 2 == 1;
        if is_waiting {
            self.without_consumer = if lacks_consumer { self.without_consumer + 1 } else { 0 };
        }
        self.without_consumer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starvation_counts_inspections_of_one_wait_with_messages() {
        let mut starvation = StarvationDetector::default();
        let counts: Vec<u32> = (0..3).map(|_| starvation.record(1, true)).collect();
        assert_eq!(counts, [1, 2, 3]);
        // The consumer has received a delivery and waits for the next.
        assert_eq!(starvation.record(3, true), 1);
        assert_eq!(starvation.record(3, true), 2);
        // The prefetch is used up, or the queue is empty.
        assert_eq!(starvation.record(3, false), 0);
        assert_eq!(starvation.record(3, true), 1);
        // The consumer does not wait, for example because the database is away.
        for _ in 0..3 {
            assert_eq!(starvation.record(4, true), 0);
        }
    }

    #[test]
    fn queue_without_consumer_is_counted_over_several_waits() {
        let mut starvation = StarvationDetector::default();
        // The session is about to consume.
        assert_eq!(starvation.record_lack(0, true), 0);
        assert_eq!(starvation.record_lack(1, true), 1);
        // Another queue has delivered.
        assert_eq!(starvation.record_lack(3, true), 2);
        assert_eq!(starvation.record_lack(4, true), 2);
        assert_eq!(starvation.record_lack(5, true), 3);
        assert_eq!(starvation.record_lack(5, false), 0);
    }
}
