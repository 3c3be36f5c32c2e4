//! A look at the queues every few seconds, by a consumer's own connection: for the metrics, and to
//! notice that the broker gives nothing although there is something.
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
/// After so many looks in a row that find messages, while the consumer waits for one and may have more,
/// something is wrong: RabbitMQ gives what is ready at once.
const IN_VAIN: u32 = 5;

/// Looks until it is dropped, which ends with the session.
pub(super) struct Look {
    found: Arc<Found>,
    task: JoinHandle<()>,
}

/// What the consumer and its look tell each other.
#[derive(Default)]
struct Found {
    /// Odd while the consumer waits for a delivery, and another number with each wait.
    waits: AtomicU64,
    in_vain: AtomicU32,
    empty: AtomicBool,
    /// Whether the queue did not exist at the last look.
    gone: AtomicBool,
    /// How many deliveries the consumer may have.
    prefetch: AtomicUsize,
}

/// The consumer waits for a delivery until this is dropped.
pub(super) struct Wait(Arc<Found>);

impl Look {
    /// At the queues of `topology`, for a consumer of so many deliveries at most. It does not keep the
    /// connection.
    pub(super) fn start(
        connection: &Arc<Link>,
        topology: Topology,
        unsettled: Arc<Unsettled>,
        expiry: Arc<ExpiryCheck>,
        prefetch: u16,
    ) -> Self {
        let found = Arc::new(Found::default());
        found.prefetch.store(prefetch.into(), Ordering::Relaxed);
        let connection = Arc::downgrade(connection);
        let looking = look(connection, topology, unsettled, expiry, Arc::clone(&found));
        Self { found, task: tokio::spawn(looking) }
    }

    pub(super) fn set_prefetch(&self, prefetch: u16) {
        self.found.prefetch.store(prefetch.into(), Ordering::Relaxed);
    }

    /// To be held while the consumer waits for a delivery.
    pub(super) fn waiting(&self) -> Wait {
        self.found.waits.fetch_add(1, Ordering::Relaxed);
        Wait(Arc::clone(&self.found))
    }

    /// Whether the consumer has waited in vain for long, with messages in the queue all the time.
    pub(super) fn is_in_vain(&self) -> bool {
        self.found.in_vain.load(Ordering::Relaxed) >= IN_VAIN
    }

    /// Whether nobody looks any more.
    pub(super) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// Whether the queue did not exist at the last look.
    pub(super) fn is_gone(&self) -> bool {
        self.found.gone.load(Ordering::Relaxed)
    }

    /// Whether the queue was empty at the last look.
    pub(super) fn is_empty(&self) -> bool {
        self.found.empty.load(Ordering::Relaxed)
    }
}

impl Drop for Look {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.0.waits.fetch_add(1, Ordering::Relaxed);
    }
}

async fn look(
    connection: Weak<Link>,
    topology: Topology,
    unsettled: Arc<Unsettled>,
    expiry: Arc<ExpiryCheck>,
    found: Arc<Found>,
) {
    let gauges = Gauges::new();
    let mut vain = Vain::default();
    // What is ready now has come after it.
    let mut was_empty_at = None;
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(connection) = connection.upgrade() else { return };
        let (at, wait) = (SystemTime::now(), found.waits.load(Ordering::Relaxed));
        let looked = timeout(RPC_TIMEOUT, depths::look(&connection, &topology)).await;
        let looked = looked.map_err(|late| late.to_string());
        let looked = match looked.and_then(|looked| looked.map_err(|error| error.to_string())) {
            Ok(looked) => looked,
            // Whether the session is over is seen elsewhere. A broker that does not say how much there is
            // can be excused for not giving it either.
            Err(error) => {
                tracing::debug!(error, "cannot look at the queues");
                found.in_vain.store(vain.note(wait, false), Ordering::Relaxed);
                continue;
            }
        };
        let depths = looked.depths;
        let is_gone = looked.missing.contains(&topology.queue);
        found.gone.store(is_gone, Ordering::Relaxed);
        if !is_gone && !looked.missing.is_empty() {
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
        found.empty.store(depths.ready == 0, Ordering::Relaxed);
        let looks =
            vain.note(wait, depths.ready > 0 && count < found.prefetch.load(Ordering::Relaxed));
        found.in_vain.store(looks, Ordering::Relaxed);
        expiry.note(&connection, &topology, depths.dead).await;
    }
}

// Decision: docs/decisions/0003-when-is-a-vanished-queue-declared-again.md
/// Declares the delay queues and the dead-letter queue if one is missing; they have no consumers. Only the next session
/// declares a missing main queue.
async fn declare_again(connection: &Link, topology: &Topology) {
    match timeout(RPC_TIMEOUT, topology.declare(connection)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "cannot declare the queues again"),
        Err(_) => tracing::debug!("cannot declare the queues again in time"),
    }
}

/// Counts the looks by which a consumer should have had something.
#[derive(Default)]
struct Vain {
    wait: u64,
    looks: u32,
}

impl Vain {
    /// Notes that during that wait there was something that the consumer could have had, or was not.
    fn note(&mut self, wait: u64, could_have: bool) -> u32 {
        let same_wait = std::mem::replace(&mut self.wait, wait) == wait;
        let waits = wait % 2 == 1;
        self.looks = match (waits && could_have, same_wait) {
            (false, _) => 0,
            // It may have begun just now.
            (true, false) => 1,
            (true, true) => self.looks + 1,
        };
        self.looks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_looks_during_one_wait_with_something_to_have_are_in_vain() {
        let mut vain = Vain::default();
        let waited: Vec<u32> = (0..3).map(|_| vain.note(1, true)).collect();
        assert_eq!(waited, [1, 2, 3]);
        // It has had one meanwhile and waits for the next.
        assert_eq!(vain.note(3, true), 1);
        assert_eq!(vain.note(3, true), 2);
        // It has all that it may have, or there is nothing.
        assert_eq!(vain.note(3, false), 0);
        assert_eq!(vain.note(3, true), 1);
        // It does not ask, as when nothing can be written.
        for _ in 0..3 {
            assert_eq!(vain.note(4, true), 0);
        }
    }
}
