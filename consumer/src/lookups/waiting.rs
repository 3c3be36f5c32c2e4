//! Deliveries that wait for a lookup. Those of one object share the next one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use broker::{Consumer, Delivery};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A delivery, and the room that it takes up until it is settled.
pub(super) struct Taken {
    pub(super) delivery: Delivery,
    pub(super) room: OwnedSemaphorePermit,
}

impl Taken {
    /// The next delivery for which there is room; `None` if there never will be.
    pub(super) async fn next(
        deliveries: &mut Consumer,
        unsettled: &Arc<Semaphore>,
    ) -> Option<Self> {
        let room = Arc::clone(unsettled).acquire_owned().await.ok()?;
        Some(Self { delivery: deliveries.next().await, room })
    }
}

/// The deliveries that wait, by what they wait for.
pub(super) struct Waiting {
    coalesce: bool,
    turns: Mutex<Turns>,
}

#[derive(Default)]
struct Turns {
    waiting: HashMap<Turn, Vec<Taken>>,
    /// How many turns there have been.
    count: u64,
}

/// Something to be looked up, for as long as deliveries come for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Turn {
    pub(super) id: i64,
    /// 0 for all deliveries of an object if they share lookups, else different for each.
    number: u64,
}

impl Waiting {
    pub(super) fn new(coalesce: bool) -> Self {
        metrics::describe_counter!(
            "lastseen_coalesced_total",
            "Deliveries that shared the lookup of another of the same object."
        );
        Self { coalesce, turns: Mutex::default() }
    }

    /// Adds a delivery of object `id`. If nobody sees to that object, the caller has to: it
    /// [joins](Self::join) what waits whenever a lookup begins, until [it is over](Self::is_over).
    pub(super) fn add(&self, id: i64, taken: Taken) -> Option<Turn> {
        let mut turns = self.turns();
        turns.count += 1;
        let turn = Turn { id, number: if self.coalesce { 0 } else { turns.count } };
        match turns.waiting.entry(turn) {
            Entry::Occupied(mut waiting) => {
                waiting.get_mut().push(taken);
                None
            }
            Entry::Vacant(vacant) => {
                vacant.insert(vec![taken]);
                Some(turn)
            }
        }
    }

    /// Moves all that waits for `turn` to `group`. What comes later waits for the next lookup.
    pub(super) fn join(&self, turn: &Turn, group: &mut Vec<Taken>) {
        if let Some(waiting) = self.turns().waiting.get_mut(turn) {
            group.append(waiting);
        }
        if let Some(shared @ 1..) = group.len().checked_sub(1) {
            metrics::counter!("lastseen_coalesced_total").increment(shared as u64);
        }
    }

    /// Takes all that waits, whatever for.
    pub(super) fn take_all(&self) -> Vec<Taken> {
        self.turns().waiting.values_mut().flat_map(std::mem::take).collect()
    }

    /// Whether nothing waits for `turn`; then whatever comes next for its object is its own.
    pub(super) fn is_over(&self, turn: &Turn) -> bool {
        let mut turns = self.turns();
        let is_over = turns.waiting.get(turn).is_none_or(Vec::is_empty);
        if is_over {
            turns.waiting.remove(turn);
        }
        is_over
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
