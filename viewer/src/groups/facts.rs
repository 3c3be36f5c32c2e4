//! What the viewer knows of the objects in groups.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use groups::{Fact, ObjectIndex};
use messaging::events::Kind;

use crate::object::Micros;

/// How long after its latest sighting an object is late, in microseconds: two thirds of its TTL.
pub(super) fn late_after(object_ttl: Duration) -> Micros {
    i64::try_from((object_ttl * 2 / 3).as_micros()).unwrap_or(i64::MAX)
}

/// The fact about an object that is online.
pub(super) fn seen(last_seen: Micros, late_before: Micros) -> Fact {
    if last_seen <= late_before { Fact::Late } else { Fact::Online }
}

/// The fact about an object after a change.
pub(super) fn changed(kind: Kind, last_seen: Micros, late_before: Micros) -> Fact {
    match kind {
        Kind::Online | Kind::Seen => seen(last_seen, late_before),
        Kind::Gone => Fact::Gone,
    }
}

pub(super) fn is_online(fact: Fact) -> bool {
    matches!(fact, Fact::Online | Fact::Late)
}

/// The fact about an object that is not in the table.
pub(super) fn absent(known: Fact) -> Fact {
    match known {
        // A change that the viewer has not followed.
        Fact::Online | Fact::Late => Fact::Gone,
        Fact::NeverSeen | Fact::GivenUp | Fact::Gone => known,
    }
}

/// When to check whether objects that are online have become late. A sighting does not move an
/// object's time, so it costs nothing: the check finds the sighting and sets a later time.
#[derive(Default)]
pub(super) struct LateChecks {
    times: BinaryHeap<Reverse<(Micros, ObjectIndex)>>,
    /// Whether the object has a time, so that an object that comes and goes has only one.
    is_scheduled: Vec<bool>,
}

impl LateChecks {
    /// For a tree with this number of objects.
    pub(super) fn new(objects: usize) -> Self {
        Self { times: BinaryHeap::new(), is_scheduled: vec![false; objects] }
    }

    /// Schedules a check, unless there is one.
    pub(super) fn schedule(&mut self, object: ObjectIndex, at: Micros) {
        let is_scheduled = self.is_scheduled.get_mut(object.position());
        if let Some(is_scheduled) = is_scheduled
            && !std::mem::replace(is_scheduled, true)
        {
            self.times.push(Reverse((at, object)));
        }
    }

    /// Takes up to `max` checks that are due.
    pub(super) fn take_due(&mut self, now: Micros, max: usize) -> Vec<ObjectIndex> {
        let mut due = Vec::new();
        while due.len() < max
            && let Some(&Reverse((at, object))) = self.times.peek()
            && at <= now
        {
            self.times.pop();
            self.is_scheduled[object.position()] = false;
            due.push(object);
        }
        due
    }

    pub(super) fn next(&self) -> Option<Micros> {
        self.times.peek().map(|Reverse((at, _))| *at)
    }
}

#[cfg(test)]
mod tests {
    use groups::{Tree, Weights};

    use super::*;

    #[test]
    fn object_is_late_two_thirds_of_its_ttl_after_its_sighting() {
        let late_after = late_after(Duration::from_secs(30));
        assert_eq!(late_after, 20_000_000);
        let at = |last_seen| seen(last_seen, 50_000_000 - late_after);
        assert_eq!([at(30_000_000), at(30_000_001)], [Fact::Late, Fact::Online]);
        assert_eq!(changed(Kind::Gone, 30_000_001, 0), Fact::Gone);
    }

    #[test]
    fn object_that_vanished_is_gone_one_never_seen_stays_so() {
        use Fact::{GivenUp, Gone, Late, NeverSeen, Online};
        let known = [Online, Late, NeverSeen, GivenUp, Gone];
        assert_eq!(known.map(absent), [Gone, Gone, NeverSeen, GivenUp, Gone]);
    }

    #[test]
    fn object_has_at_most_one_check() {
        let definition: &[u8] = br#"{"name": "a", "objects": [1, 2, 3]}"#;
        let tree: Tree = groups::parse([("a", definition)], Weights::default()).unwrap();
        let [first, second, third] = [1, 2, 3].map(|id| tree.object(id).unwrap());
        let mut checks = LateChecks::new(3);
        for (object, at) in [(first, 30), (second, 10), (first, 5), (third, 20)] {
            checks.schedule(object, at);
        }
        assert_eq!(checks.next(), Some(10));
        assert_eq!(checks.take_due(9, 10), []);
        assert_eq!(checks.take_due(30, 2), [second, third]);
        checks.schedule(second, 40);
        assert_eq!(checks.take_due(30, 2), [first]);
        assert_eq!(checks.next(), Some(40));
    }
}
