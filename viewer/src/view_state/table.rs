//! A copy of the table, built from readings of the table and from events.
//!
//! Decision: docs/decisions/0050-how-does-the-viewer-order-events.md

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque, btree_map};
use std::time::{Duration, Instant};

use messaging::events::Kind;

use crate::object::{Micros, Object};

/// Number of sightings to keep for each object.
pub(crate) const SIGHTINGS_MAX: usize = 20;
/// The sightings of an object. The latest is at the end.
pub(crate) type Sightings = VecDeque<Micros>;

/// How long a gone object is remembered. An old sighting that arrives within this time does not
/// bring the object back.
const GONE_RETENTION: Duration = Duration::from_mins(2);
/// Maximum number of remembered gone objects; above it, the oldest are forgotten.
const GONE_MAX: usize = 200_000;

#[derive(Default)]
pub(super) struct Table {
    objects: BTreeMap<i64, Entry>,
    gone: HashMap<i64, Gone>,
    /// The gone objects, in the order in which they were deleted.
    gone_at: VecDeque<(Instant, i64)>,
    /// The number of the current or latest reading.
    reading: u64,
}

struct Entry {
    last_seen: Micros,
    sightings: Sightings,
    /// The number of the reading in which the latest event or row about the object arrived.
    confirmed_in: u64,
}

#[derive(Clone, Copy)]
struct Gone {
    last_seen: Micros,
    at: Instant,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.objects.len()
    }

    /// Applies a sighting. Returns how it changes the object, or `None` if it is not later than the
    /// known ones.
    pub(super) fn mark_seen(&mut self, seen: Object) -> Option<Kind> {
        let Object { id, last_seen } = seen;
        // A late event, or a row that was read before it was deleted.
        let is_old =
            |gone: &Gone| last_seen <= gone.last_seen && gone.at.elapsed() < GONE_RETENTION;
        if self.gone.get(&id).is_some_and(is_old) {
            return None;
        }
        if let Some(entry) = self.objects.get_mut(&id) {
            entry.confirmed_in = self.reading;
            if last_seen <= entry.last_seen {
                return None;
            }
            entry.last_seen = last_seen;
            if entry.sightings.len() == SIGHTINGS_MAX {
                entry.sightings.pop_front();
            }
            entry.sightings.push_back(last_seen);
            return Some(Kind::Seen);
        }
        self.gone.remove(&id);
        let sightings = VecDeque::from([last_seen]);
        self.objects.insert(id, Entry { last_seen, sightings, confirmed_in: self.reading });
        Some(Kind::Online)
    }

    /// Applies a deletion of the object, with its `last_seen` at that time. Returns the object if
    /// it was online and has not been seen since.
    pub(super) fn mark_gone(&mut self, gone: Object) -> Option<Object> {
        let Object { id, last_seen } = gone;
        if self.objects.get(&id).is_some_and(|entry| entry.last_seen > last_seen) {
            return None;
        }
        self.remember_gone(gone);
        self.objects.remove(&id).map(|_| gone)
    }

    /// Adds an object that was online earlier, or its earlier sightings if it is online now.
    pub(super) fn restore(&mut self, id: i64, sightings: Sightings) {
        let Some(&last_seen) = sightings.back() else { return };
        if self.gone.get(&id).is_some_and(|gone| last_seen <= gone.last_seen) {
            return;
        }
        match self.objects.entry(id) {
            btree_map::Entry::Vacant(vacant) => {
                vacant.insert(Entry { last_seen, sightings, confirmed_in: self.reading });
            }
            btree_map::Entry::Occupied(mut online) => {
                let known = online.get_mut();
                let all: BTreeSet<Micros> = known.sightings.drain(..).chain(sightings).collect();
                known.last_seen = known.last_seen.max(last_seen);
                let surplus = all.len().saturating_sub(SIGHTINGS_MAX);
                known.sightings = all.into_iter().skip(surplus).collect();
            }
        }
    }

    /// Begins a reading of the table. The caller marks the objects of all rows as seen.
    pub(super) fn begin_reading(&mut self) {
        self.reading += 1;
    }

    /// Removes objects without a row or an event since the reading began. Checks up to `max`
    /// objects from `first` on. Returns the removed objects, and the id from which to continue.
    pub(super) fn remove_unread(&mut self, first: i64, max: usize) -> (Vec<Object>, Option<i64>) {
        let reading = self.reading;
        let mut entries = self.objects.range(first..);
        let checked = entries.by_ref().take(max);
        let missing = checked.filter(|(_, entry)| entry.confirmed_in < reading);
        let missing: Vec<Object> =
            missing.map(|(&id, entry)| Object { id, last_seen: entry.last_seen }).collect();
        let next = entries.next().map(|(&id, _)| id);
        for gone in &missing {
            self.objects.remove(&gone.id);
        }
        (missing, next)
    }

    /// The number of the current or latest reading.
    pub(super) fn reading(&self) -> u64 {
        self.reading
    }

    pub(super) fn get(&self, id: i64) -> Option<Object> {
        self.objects.get(&id).map(|entry| Object { id, last_seen: entry.last_seen })
    }

    /// The kept sightings of an object, latest first.
    pub(super) fn sightings(&self, id: i64) -> Option<Vec<Micros>> {
        self.objects.get(&id).map(|entry| entry.sightings.iter().rev().copied().collect())
    }

    /// The objects with ids from `first` on, in ascending order.
    pub(super) fn from(&self, first: i64) -> impl Iterator<Item = Object> {
        let entries = self.objects.range(first..);
        entries.map(|(&id, entry)| Object { id, last_seen: entry.last_seen })
    }

    /// The sightings of the objects with ids from `first` on, in ascending order of the ids.
    pub(super) fn sightings_from(&self, first: i64) -> impl Iterator<Item = (i64, &Sightings)> {
        self.objects.range(first..).map(|(&id, entry)| (id, &entry.sightings))
    }

    fn remember_gone(&mut self, gone: Object) {
        let at = Instant::now();
        self.gone.insert(gone.id, Gone { last_seen: gone.last_seen, at });
        self.gone_at.push_back((at, gone.id));
        // For each object that is added, up to two old ones are forgotten, so the list shrinks
        // without a full pass.
        for _ in 0..2 {
            let is_expired = |(at, _): &(Instant, i64)| at.elapsed() >= GONE_RETENTION;
            if self.gone_at.len() <= GONE_MAX && !self.gone_at.front().is_some_and(is_expired) {
                break;
            }
            let Some((at, id)) = self.gone_at.pop_front() else { break };
            // The object may have come back and gone again since.
            if self.gone.get(&id).is_some_and(|gone| gone.at == at) {
                self.gone.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(id: i64, last_seen: Micros) -> Object {
        Object { id, last_seen }
    }

    #[test]
    fn only_a_later_sighting_changes_an_object() {
        let mut table = Table::default();
        assert_eq!(table.mark_seen(at(1, 10)), Some(Kind::Online));
        assert_eq!(table.mark_seen(at(1, 20)), Some(Kind::Seen));
        assert_eq!(table.mark_seen(at(1, 20)), None);
        assert_eq!(table.mark_seen(at(1, 15)), None);
        assert_eq!(table.mark_gone(at(1, 20)), Some(at(1, 20)));
        assert_eq!(table.mark_gone(at(1, 20)), None);
        assert_eq!(table.mark_gone(at(2, 20)), None);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn event_order_of_consumer_and_routine_is_irrelevant() {
        // Seen at 20, then deleted; the events arrive in the other order.
        let mut table = Table::default();
        table.mark_seen(at(1, 10));
        assert_eq!(table.mark_gone(at(1, 20)), Some(at(1, 20)));
        assert_eq!(table.mark_seen(at(1, 20)), None, "an old sighting brought it back");
        assert_eq!(
            table.mark_seen(at(1, 30)),
            Some(Kind::Online),
            "a later sighting must bring it back"
        );
        // Deleted with `last_seen` 20, then seen at 30; the second event arrives first.
        assert_eq!(table.mark_gone(at(1, 20)), None);
        assert_eq!(table.get(1), Some(at(1, 30)));
    }

    #[test]
    fn object_without_row_or_event_in_a_reading_is_gone() {
        let mut table = Table::default();
        for id in 1..=4 {
            table.mark_seen(at(id, 10));
        }
        table.begin_reading();
        table.mark_seen(at(1, 10));
        table.mark_seen(at(5, 10));
        // Events during the reading: an update that the reader missed, and a deletion.
        table.mark_seen(at(2, 20));
        table.mark_gone(at(3, 10));
        assert_eq!(table.mark_seen(at(3, 10)), None);
        assert_eq!(table.remove_unread(i64::MIN, 2), (Vec::new(), Some(4)));
        assert_eq!(table.remove_unread(4, 2), (vec![at(4, 10)], None));
        assert_eq!(table.from(i64::MIN).map(|object| object.id).collect::<Vec<_>>(), [1, 2, 5]);
    }

    #[test]
    fn latest_20_sightings_are_kept_latest_first() {
        let mut table = Table::default();
        for time in 1..=50 {
            table.mark_seen(at(1, time));
        }
        assert_eq!(table.sightings(1).unwrap(), (31..=50).rev().collect::<Vec<_>>());
        assert_eq!(table.sightings(2), None);
    }

    #[test]
    fn restored_object_keeps_what_is_known_by_events() {
        let mut table = Table::default();
        for time in [20, 40] {
            table.mark_seen(at(1, time));
        }
        table.mark_seen(at(2, 20));
        table.mark_gone(at(3, 20));
        table.mark_gone(at(4, 20));
        for id in [1, 2, 3] {
            table.restore(id, Sightings::from([10, 20]));
        }
        for id in [2, 4, 5] {
            table.restore(id, Sightings::from([10, 30]));
        }
        let known = [1, 2, 3, 4, 5].map(|id| table.sightings(id).unwrap_or_default());
        let (both, later) = (vec![30, 10], vec![30, 20, 10]);
        assert_eq!(known, [vec![40, 20, 10], later, vec![], both.clone(), both]);
        assert_eq!(table.get(2), Some(at(2, 30)));
        table.restore(1, (1..=30).collect());
        assert_eq!(table.sightings(1).unwrap(), [vec![40], (12..=30).rev().collect()].concat());
    }
}
