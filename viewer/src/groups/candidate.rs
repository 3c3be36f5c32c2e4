//! A new definition that is not in effect yet.

use groups::{Announcer, Fact, Tree};
use tokio::sync::oneshot;

use super::Live;
use super::facts::{self, LateChecks};
use crate::object::Micros;
use crate::view_state::{SCAN_MAX, ViewState};

/// A definition, and what is known of its objects so far.
pub(super) struct Candidate {
    tree: Tree,
    facts: Vec<Fact>,
    /// Number of objects that have been looked up in the table.
    scanned: usize,
    /// Whether an object is neither online nor in the current tree, so that only the history knows
    /// whether it was ever seen.
    has_unknown: bool,
    /// Gets `has_unknown` once all objects have been looked up.
    needs_history: Option<oneshot::Sender<bool>>,
    /// Whether the history has been read.
    may_take_effect: bool,
}

impl Candidate {
    pub(super) fn new(tree: Tree, needs_history: oneshot::Sender<bool>) -> Self {
        let facts = vec![Fact::NeverSeen; tree.object_ids().len()];
        let needs_history = Some(needs_history);
        Self { tree, facts, scanned: 0, has_unknown: false, needs_history, may_take_effect: false }
    }

    pub(super) fn is_scanned(&self) -> bool {
        self.scanned == self.facts.len() && self.needs_history.is_none()
    }

    pub(super) fn set(&mut self, id: i64, fact: Fact) {
        if let Some(object) = self.tree.object(id) {
            self.facts[object.position()] = fact;
        }
    }

    /// Marks an object that the history has as gone, unless a later fact is known.
    pub(super) fn mark_gone(&mut self, id: i64) {
        if let Some(object) = self.tree.object(id)
            && self.facts[object.position()] == Fact::NeverSeen
        {
            self.facts[object.position()] = Fact::Gone;
        }
    }

    /// Records that a consumer has given up the object, unless it is online.
    pub(super) fn mark_given_up(&mut self, id: i64) {
        if let Some(object) = self.tree.object(id)
            && !facts::is_online(self.facts[object.position()])
        {
            self.facts[object.position()] = Fact::GivenUp;
        }
    }

    /// Looks up all objects again.
    pub(super) fn scan_again(&mut self) {
        self.scanned = 0;
    }

    pub(super) fn finish_history(&mut self) {
        self.may_take_effect = true;
    }

    /// Whether the facts about all objects are known.
    pub(super) fn is_ready(&self) -> bool {
        self.may_take_effect && self.is_scanned()
    }

    /// Looks up the next [`SCAN_MAX`] objects in the table.
    pub(super) fn scan(&mut self, view: &ViewState, late_before: Micros, current: Option<&Tree>) {
        let end = self.facts.len().min(self.scanned + SCAN_MAX);
        let ids = &self.tree.object_ids()[self.scanned..end];
        let facts = self.facts[self.scanned..end].iter_mut();
        for ((fact, id), last_seen) in facts.zip(ids).zip(view.last_seen(ids)) {
            *fact = last_seen
                .map_or_else(|| facts::absent(*fact), |seen| facts::seen(seen, late_before));
            self.has_unknown |= *fact == Fact::NeverSeen
                && current.is_none_or(|current| current.object(*id).is_none());
        }
        self.scanned = end;
        if end == self.facts.len()
            && let Some(needs_history) = self.needs_history.take()
        {
            // An error means that a newer definition is coming.
            _ = needs_history.send(self.has_unknown);
        }
    }

    /// Computes the statuses. Groups with the same path in the old tree keep their announced
    /// status.
    pub(super) fn into_live(
        self,
        definition: u64,
        old: Option<&Live>,
        now: u64,
    ) -> (Live, LateChecks) {
        let Self { mut tree, mut facts, .. } = self;
        if let Some(Live { tree: old, .. }) = old {
            // What the viewer saw itself, the history may not have.
            for (fact, id) in facts.iter_mut().zip(tree.object_ids()) {
                if let (Fact::NeverSeen | Fact::Gone, Some(object)) = (*fact, old.object(*id))
                    && let known @ (Fact::Gone | Fact::GivenUp) = old.fact(object)
                {
                    *fact = known;
                }
            }
        }
        let mut late_checks = LateChecks::new(facts.len());
        tree.set_facts(|object, _| {
            let fact = facts[object.position()];
            if fact == Fact::Online {
                // The first check finds the latest sighting.
                late_checks.schedule(object, Micros::MIN);
            }
            fact
        });
        tree.end_maintenance(now, &mut Vec::new());
        let announcer = match old {
            None => Announcer::new(&tree, now),
            Some(old) => Announcer::carry_over(&tree, now, &old.tree, &old.announcer),
        };
        (Live { definition, tree, announcer }, late_checks)
    }
}
