//! The statuses of the groups: the full pass, and the update after a change of one object.

use crate::kind::{Fact, Kind, Status};
use crate::rules::Rules;
use crate::tree::{GroupIndex, ObjectIndex, State, Tree};

impl Tree {
    /// Sets the facts of all objects, and then computes all statuses.
    pub fn set_facts(&mut self, mut fact_of: impl FnMut(ObjectIndex, i64) -> Fact) {
        let objects = (0..).map(ObjectIndex).zip(&self.definition.ids);
        for (fact, (object, &id)) in self.facts.iter_mut().zip(objects) {
            *fact = fact_of(object, id);
        }
        self.compute();
    }

    /// Computes the statuses of all groups in one pass, children before parents. Allocates nothing.
    pub fn compute(&mut self) {
        for state in &mut self.states {
            state.counts = [0; 6];
            state.share = 0;
        }
        for object in (0..).map(ObjectIndex).take(self.facts.len()) {
            let kind = self.kind(object);
            let share = u32::from(self.weights.counts_as_up(kind));
            let (start, homes, end) = self.place_range(object);
            for place in start..homes {
                let state = &mut self.states[self.places[place] as usize];
                // A count is below 0 in between, if an ancestor is subtracted before it is added.
                state.counts[kind as usize] = state.counts[kind as usize].wrapping_add(1);
                state.share += share;
            }
            for place in homes..end {
                let state = &mut self.states[self.places[place] as usize];
                state.counts[kind as usize] = state.counts[kind as usize].wrapping_sub(1);
            }
        }
        for group in (1..self.states.len()).rev() {
            self.states[group]
                .settle(&self.definition.rules[self.definition.rules_of[group] as usize]);
            let State { counts, contribution, .. } = self.states[group];
            let parent = &mut self.states[self.definition.parents[group] as usize];
            for (sum, count) in parent.counts.iter_mut().zip(counts) {
                *sum = sum.wrapping_add(count);
            }
            parent.share += contribution;
        }
    }

    /// Sets the fact of an object and updates the groups that contain it. Appends the groups whose
    /// status changed.
    pub fn set_fact(&mut self, object: ObjectIndex, fact: Fact, changed: &mut Vec<GroupIndex>) {
        let was = self.kind(object);
        self.facts[object.position()] = fact;
        self.reclassify(object, was, changed);
    }

    /// Updates the groups that contain an object whose kind was `was`.
    ///
    /// Climbs from each group of the object to the ancestor that it has in common with the next
    /// one, so that the climbs together pass each ancestor once, and only after all of its
    /// subgroups.
    pub(crate) fn reclassify(
        &mut self,
        object: ObjectIndex,
        was: Kind,
        changed: &mut Vec<GroupIndex>,
    ) {
        let is = self.kind(object);
        if is == was {
            return;
        }
        let step = u32::from(self.weights.counts_as_up(is))
            .wrapping_sub(u32::from(self.weights.counts_as_up(was)));
        let (start, homes, end) = self.place_range(object);
        for place in start..homes {
            let mut group = self.places[place] as usize;
            let common = place - start + homes;
            let top = if common < end { self.places[common] as usize } else { 0 };
            self.states[group].share = self.states[group].share.wrapping_add(step);
            while group != top {
                let state = &mut self.states[group];
                state.counts[was as usize] -= 1;
                state.counts[is as usize] += 1;
                let (status, contribution) = (state.status, state.contribution);
                state.settle(&self.definition.rules[self.definition.rules_of[group] as usize]);
                if state.status != status {
                    changed.push(GroupIndex(crate::definition::index(group)));
                }
                let step = state.contribution.wrapping_sub(contribution);
                group = self.definition.parents[group] as usize;
                self.states[group].share = self.states[group].share.wrapping_add(step);
            }
        }
    }
}

// Decision: docs/decisions/0090-how-does-a-groups-rule-count-its-child-groups.md
impl State {
    /// Derives the status and the contribution from the share.
    fn settle(&mut self, rules: &Rules) {
        self.status = if self.weight == 0 || self.share >= rules.up.threshold(self.weight) {
            Status::Up
        } else if self.share >= rules.degraded.threshold(self.weight) {
            Status::Degraded
        } else {
            Status::Down
        };
        self.contribution = if self.status == Status::Up { self.weight } else { self.share };
    }
}
