//! Deliveries that wait for a lookup. Those of one object share the next one.
//!
//! Decision: docs/decisions/0023-how-do-deliveries-of-one-object-share-a-lookup.md

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use broker::{Consumer, Delivery};
use service::traces::Span;
use tokio::time::Instant;

use crate::resizable_semaphore::{Permit, Room};

/// A delivery, and the room that it takes up until it is settled.
pub(super) struct Taken {
    pub(super) delivery: Delivery,
    pub(super) since: Instant,
    pub(super) room: Permit,
    /// Ends when it is settled.
    pub(super) span: Span,
}

impl Taken {
    /// The next delivery for which there is room.
    pub(super) async fn next(deliveries: &mut Consumer, unsettled: &Arc<Room>) -> Self {
        let room = unsettled.enter().await;
        let delivery = deliveries.next().await;
        Self { delivery, since: Instant::now(), room, span: Span::default() }
    }
}

/// The deliveries that wait, by what they wait for.
pub(super) struct Waiting {
    coalesce: bool,
    turns: Mutex<Turns>,
}

#[derive(Default)]
struct Turns {
    /// Those whose turn has come or is to come.
    waiting: HashMap<Turn, Vec<Taken>>,
    /// Those whose turn is to come, in order.
    queue: VecDeque<Turn>,
    /// How many deliveries there have been.
    count: u64,
}

/// An object's turn to be looked up, for those that wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Turn {
    pub(super) id: i64,
    /// 0 if all deliveries of an object share lookups, else different for each.
    number: u64,
}

impl Waiting {
    pub(super) fn new(coalesce: bool) -> Self {
        metrics::describe_counter!(
            "lastseen_coalesced_total",
            "Deliveries that shared the lookup of another of the same object."
        );
        metrics::counter!("lastseen_coalesced_total").increment(0);
        Self { coalesce, turns: Mutex::default() }
    }

    /// Adds a delivery of object `id`.
    pub(super) fn add(&self, id: i64, taken: Taken) {
        let turns = &mut *self.turns();
        turns.count += 1;
        let turn = Turn { id, number: if self.coalesce { 0 } else { turns.count } };
        turns
            .waiting
            .entry(turn)
            .or_insert_with(|| {
                turns.queue.push_back(turn);
                // Most are alone; it would begin with room for four.
                Vec::with_capacity(1)
            })
            .push(taken);
    }

    pub(super) fn has_turns(&self) -> bool {
        !self.turns().queue.is_empty()
    }

    /// Whose turn it is, and what waits for it. Whoever asks has to [end](Self::end) it. Deliveries that
    /// are lost meanwhile are dropped: they are delivered again, and a lookup now would be one more.
    pub(super) fn next_turn(&self) -> Option<(Turn, Vec<Taken>)> {
        let turns = &mut *self.turns();
        while let Some(turn) = turns.queue.pop_front() {
            let waiting = turns.waiting.entry(turn).or_default();
            waiting.retain(|taken| !taken.delivery.is_lost());
            if !waiting.is_empty() {
                let group = std::mem::take(waiting);
                count_shared(group.len() - 1);
                return Some((turn, group));
            }
            turns.waiting.remove(&turn);
        }
        None
    }

    /// Moves all that waits for `turn` to `group`. What comes later waits for the next lookup.
    pub(super) fn join(&self, turn: &Turn, group: &mut Vec<Taken>) {
        if let Some(waiting) = self.turns().waiting.get_mut(turn) {
            count_shared(waiting.len());
            group.append(waiting);
        }
    }

    /// The turn is over. What has come for its object meanwhile gets another one.
    pub(super) fn end(&self, turn: Turn) {
        let turns = &mut *self.turns();
        if turns.waiting.get(&turn).is_some_and(|waiting| !waiting.is_empty()) {
            turns.queue.push_back(turn);
        } else {
            turns.waiting.remove(&turn);
        }
    }

    /// Takes what waits since before that moment.
    pub(super) fn take_older_than(&self, moment: Instant) -> Vec<Taken> {
        let Turns { waiting, queue, .. } = &mut *self.turns();
        let older = |taken: &mut Taken| taken.since < moment;
        let taken =
            waiting.values_mut().flat_map(|waiting| waiting.extract_if(.., older)).collect();
        queue.retain(|turn| {
            let is_wanted = waiting.get(turn).is_some_and(|waiting| !waiting.is_empty());
            if !is_wanted {
                waiting.remove(turn);
            }
            is_wanted
        });
        taken
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn count_shared(deliveries: usize) {
    if deliveries > 0 {
        metrics::counter!("lastseen_coalesced_total").increment(deliveries as u64);
    }
}
