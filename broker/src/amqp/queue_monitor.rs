//! Inspects the queues every few seconds on a consumer's connection: for the metrics, and to detect
//! that the broker delivers nothing although the queue is not empty.
//!
//! Decision: docs/decisions/0016-how-is-the-age-of-the-oldest-message-measured.md

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::depths;
use super::expiry_check::ExpiryCheck;
use super::link::{Link, RPC_TIMEOUT};
use super::topology::Topology;
use super::unsettled::Unsettled;
use crate::gauges::Gauges;

const INTERVAL: Duration = Duration::from_secs(2);
// Decision: docs/decisions/0017-how-does-a-consumer-detect-starvation.md
/// A consumer is starving after this many inspections in a row that found ready messages while it
/// waited for one with free prefetch. RabbitMQ normally delivers a ready message at once.
const STARVING_AFTER: u32 = 5;

/// Inspects the queues until it is dropped at the end of the session.
pub(super) struct QueueMonitor {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

/// What the consumer and its monitor share.
#[derive(Default)]
struct Shared {
    /// Incremented at the start and at the end of each wait, so it is odd while the consumer waits
    /// for a delivery.
    waits: AtomicU64,
    /// Inspections in a row that suggest starvation.
    starved_inspections: AtomicU32,
    queue_is_empty: AtomicBool,
    queue_is_missing: AtomicBool,
    /// The consumer's limit on unsettled deliveries.
    prefetch: AtomicUsize,
}

/// The consumer waits for a delivery until this is dropped.
pub(super) struct Wait(Arc<Shared>);

impl QueueMonitor {
    /// Starts inspecting the queues of `topology`, for a consumer with this prefetch. It does not
    /// keep the connection open.
    pub(super) fn start(
        connection: &Arc<Link>,
        topology: Topology,
        unsettled: Arc<Unsettled>,
        expiry: Arc<ExpiryCheck>,
        prefetch: u16,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        shared.prefetch.store(prefetch.into(), Ordering::Relaxed);
        let connection = Arc::downgrade(connection);
        let monitor = monitor(connection, topology, unsettled, expiry, Arc::clone(&shared));
        Self { shared, task: tokio::spawn(monitor) }
    }

    pub(super) fn set_prefetch(&self, prefetch: u16) {
        self.shared.prefetch.store(prefetch.into(), Ordering::Relaxed);
    }

    /// Begins a wait for a delivery. The consumer holds the result until it has one.
    pub(super) fn start_wait(&self) -> Wait {
        self.shared.waits.fetch_add(1, Ordering::Relaxed);
        Wait(Arc::clone(&self.shared))
    }

    /// Whether the consumer has been waiting for long although the queue was never empty.
    pub(super) fn is_starving(&self) -> bool {
        self.shared.starved_inspections.load(Ordering::Relaxed) >= STARVING_AFTER
    }

    /// Whether the task has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Whether the main queue did not exist at the last inspection.
    pub(super) fn queue_is_missing(&self) -> bool {
        self.shared.queue_is_missing.load(Ordering::Relaxed)
    }

    /// Whether the main queue was empty at the last inspection.
    pub(super) fn queue_is_empty(&self) -> bool {
        self.shared.queue_is_empty.load(Ordering::Relaxed)
    }
}

impl Drop for QueueMonitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.0.waits.fetch_add(1, Ordering::Relaxed);
    }
}

async fn monitor(
    connection: Weak<Link>,
    topology: Topology,
    unsettled: Arc<Unsettled>,
    expiry: Arc<ExpiryCheck>,
    shared: Arc<Shared>,
) {
    let gauges = Gauges::new();
    let mut starvation = StarvationDetector::default();
    // All ready messages have arrived after this time.
    let mut was_empty_at = None;
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(connection) = connection.upgrade() else { return };
        let (at, wait) = (SystemTime::now(), shared.waits.load(Ordering::Relaxed));
        let state = timeout(RPC_TIMEOUT, depths::inspect(&connection, &topology)).await;
        let state = state.map_err(|late| late.to_string());
        let state = match state.and_then(|state| state.map_err(|error| error.to_string())) {
            Ok(state) => state,
            // The consumer itself notices that the session is over. Without a count, there is no
            // evidence of starvation.
            Err(error) => {
                tracing::debug!(error, "cannot inspect the queues");
                let count = starvation.record(wait, false);
                shared.starved_inspections.store(count, Ordering::Relaxed);
                continue;
            }
        };
        let depths = state.depths;
        let queue_is_missing = state.missing.contains(&topology.queue);
        shared.queue_is_missing.store(queue_is_missing, Ordering::Relaxed);
        if !queue_is_missing && !state.missing.is_empty() {
            declare_again(&connection, &topology).await;
        }
        if depths.ready == 0 {
            was_empty_at = Some(at);
        }
        let count = unsettled.count();
        let ready_since =
            if depths.ready > 0 { unsettled.newest().max(was_empty_at) } else { None };
        let oldest = [unsettled.oldest(), ready_since].into_iter().flatten().min();
        gauges.set(depths, count, oldest);
        shared.queue_is_empty.store(depths.ready == 0, Ordering::Relaxed);
        let could_deliver = depths.ready > 0 && count < shared.prefetch.load(Ordering::Relaxed);
        let starved_inspections = starvation.record(wait, could_deliver);
        shared.starved_inspections.store(starved_inspections, Ordering::Relaxed);
        expiry.note(&connection, &topology, depths.dead).await;
    }
}

// Decision: docs/decisions/0003-when-is-a-vanished-queue-declared-again.md
/// Declares the delay queues and the dead-letter queue if one is missing, since no session consumes
/// them. A missing main queue is declared only by the next session.
async fn declare_again(connection: &Link, topology: &Topology) {
    match timeout(RPC_TIMEOUT, topology.declare(connection)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "cannot declare the queues again"),
        Err(_) => tracing::debug!("declaring the queues again timed out"),
    }
}

/// Counts the inspections in a row that found a message which the waiting consumer should have
/// received.
#[derive(Default)]
struct StarvationDetector {
    wait: u64,
    inspections: u32,
}

impl StarvationDetector {
    /// Records an inspection during `wait`: whether the broker could have delivered a message.
    /// Returns the count.
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
}
