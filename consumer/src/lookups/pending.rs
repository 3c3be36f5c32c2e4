//! Deliveries that wait for a lookup. All deliveries of one object that wait share the next lookup.
//!
//! Decision: docs/decisions/0023-how-do-deliveries-of-one-object-share-a-lookup.md

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use messaging::queue::{Consumer, Delivery};
use parking_lot::Mutex;
use runtime::traces::Span;
use tokio::time::Instant;

use crate::resizable_semaphore::{Permit, ResizableSemaphore};

/// A delivery that is not settled, with its permit.
pub(super) struct PendingDelivery {
    pub(super) delivery: Delivery,
    pub(super) received_at: Instant,
    pub(super) permit: Permit,
    /// Ends when the delivery is settled.
    pub(super) span: Span,
}

impl PendingDelivery {
    /// Waits for a permit, then for the next delivery.
    pub(super) async fn receive(
        deliveries: &mut Consumer,
        unsettled: &Arc<ResizableSemaphore>,
    ) -> Self {
        let permit = unsettled.acquire().await;
        let delivery = deliveries.next().await;
        Self { delivery, received_at: Instant::now(), permit, span: Span::default() }
    }
}

/// The deliveries that wait, grouped by the lookup that they wait for.
pub(super) struct PendingDeliveries {
    coalesce: bool,
    groups: Mutex<Groups>,
}

#[derive(Default)]
struct Groups {
    /// An entry exists while deliveries wait for its lookup, and while its lookup is in flight.
    by_key: HashMap<LookupKey, Vec<PendingDelivery>>,
    /// The lookups that have not started, in order.
    queue: VecDeque<LookupKey>,
    deliveries_added: u64,
}

/// Identifies the lookup that a delivery waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct LookupKey {
    pub(super) id: i64,
    /// 0 if all deliveries of an object share lookups, otherwise unique for each delivery.
    number: u64,
}

impl PendingDeliveries {
    pub(super) fn new(coalesce: bool) -> Self {
        metrics::describe_counter!(
            "lastseen_coalesced_total",
            "Deliveries that shared the lookup of another delivery of the same object."
        );
        metrics::counter!("lastseen_coalesced_total").increment(0);
        Self { coalesce, groups: Mutex::default() }
    }

    pub(super) fn add(&self, id: i64, pending: PendingDelivery) {
        let groups = &mut *self.groups.lock();
        groups.deliveries_added += 1;
        let number = if self.coalesce { 0 } else { groups.deliveries_added };
        let key = LookupKey { id, number };
        groups
            .by_key
            .entry(key)
            .or_insert_with(|| {
                groups.queue.push_back(key);
                // Most groups have one delivery; a default Vec would allocate space for four.
                Vec::with_capacity(1)
            })
            .push(pending);
    }

    pub(super) fn has_next(&self) -> bool {
        !self.groups.lock().queue.is_empty()
    }

    /// Takes the next lookup and its deliveries. The caller must [finish](Self::finish) the lookup.
    /// Drops deliveries that were lost with their broker session: the broker delivers their
    /// messages again, and then they get their lookup.
    pub(super) fn take_next(&self) -> Option<(LookupKey, Vec<PendingDelivery>)> {
        let groups = &mut *self.groups.lock();
        while let Some(key) = groups.queue.pop_front() {
            let waiting = groups.by_key.entry(key).or_default();
            waiting.retain(|pending| !pending.delivery.is_lost());
            if !waiting.is_empty() {
                let group = std::mem::take(waiting);
                count_coalesced(group.len() - 1);
                return Some((key, group));
            }
            groups.by_key.remove(&key);
        }
        None
    }

    /// Moves the deliveries that wait for `key` to `group`. Later deliveries wait for the next
    /// lookup.
    pub(super) fn join(&self, key: LookupKey, group: &mut Vec<PendingDelivery>) {
        if let Some(waiting) = self.groups.lock().by_key.get_mut(&key) {
            count_coalesced(waiting.len());
            group.append(waiting);
        }
    }

    /// Ends the lookup. If deliveries have arrived for its object meanwhile, queues another one.
    pub(super) fn finish(&self, key: LookupKey) {
        let groups = &mut *self.groups.lock();
        if groups.by_key.get(&key).is_some_and(|waiting| !waiting.is_empty()) {
            groups.queue.push_back(key);
        } else {
            groups.by_key.remove(&key);
        }
    }

    /// Removes and returns the deliveries that were received before `moment`.
    pub(super) fn take_older_than(&self, moment: Instant) -> Vec<PendingDelivery> {
        let Groups { by_key, queue, .. } = &mut *self.groups.lock();
        let is_older = |pending: &mut PendingDelivery| pending.received_at < moment;
        let taken =
            by_key.values_mut().flat_map(|waiting| waiting.extract_if(.., is_older)).collect();
        queue.retain(|key| {
            let has_deliveries = by_key.get(key).is_some_and(|waiting| !waiting.is_empty());
            if !has_deliveries {
                by_key.remove(key);
            }
            has_deliveries
        });
        taken
    }
}

fn count_coalesced(deliveries: usize) {
    if deliveries > 0 {
        metrics::counter!("lastseen_coalesced_total").increment(deliveries as u64);
    }
}
