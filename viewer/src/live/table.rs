//! The table, as far as is known from readings and events.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use events::Kind;

use super::{Micros, Sighted};

/// The sightings that are kept of an object.
const SIGHTINGS_MAX: usize = 20;
/// How long it is remembered who is gone: a sighting from before that comes so much later is not
/// taken for a return.
const GONE_FOR: Duration = Duration::from_mins(2);
/// The most of them; beyond it, the first are forgotten.
const GONE_MAX: usize = 200_000;

#[derive(Default)]
pub(super) struct Table {
    objects: BTreeMap<i64, Entry>,
    gone: HashMap<i64, Micros>,
    /// In the order in which they went.
    gone_at: VecDeque<(Instant, i64)>,
    reading: u64,
}

struct Entry {
    last_seen: Micros,
    /// The latest last.
    sightings: VecDeque<Micros>,
    /// Which reading of the table was under way, or over, when it was heard of.
    heard_in: u64,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.objects.len()
    }

    /// It was seen at that moment. Says what that is to those who knew of all before; nothing if it is
    /// no news.
    pub(super) fn see(&mut self, seen: Sighted) -> Option<Kind> {
        let Sighted { id, last_seen } = seen;
        // What was told late, or read before it was deleted.
        if self.gone.get(&id).is_some_and(|gone| last_seen <= *gone) {
            return None;
        }
        if let Some(entry) = self.objects.get_mut(&id) {
            entry.heard_in = self.reading;
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
        self.objects.insert(id, Entry { last_seen, sightings, heard_in: self.reading });
        Some(Kind::Online)
    }

    /// It was deleted as it was at that moment. Says whether that is news: it is none of an object that
    /// has been seen since.
    pub(super) fn leave(&mut self, gone: Sighted) -> Option<Sighted> {
        let Sighted { id, last_seen } = gone;
        if self.objects.get(&id).is_some_and(|entry| entry.last_seen > last_seen) {
            return None;
        }
        self.remember(gone);
        self.objects.remove(&id).map(|_| gone)
    }

    /// A reading of the table begins, all of whose rows are to be seen.
    pub(super) fn begin_reading(&mut self) {
        self.reading += 1;
        while let Some((at, id)) = self.gone_at.front().copied() {
            if at.elapsed() < GONE_FOR {
                break;
            }
            self.gone_at.pop_front();
            self.gone.remove(&id);
        }
    }

    /// The reading is over: whoever was not in it, and not told of meanwhile, is gone.
    pub(super) fn end_reading(&mut self) -> Vec<Sighted> {
        let reading = self.reading;
        let missing = self.objects.iter().filter(|(_, entry)| entry.heard_in < reading);
        let missing: Vec<Sighted> =
            missing.map(|(&id, entry)| Sighted { id, last_seen: entry.last_seen }).collect();
        for gone in &missing {
            self.objects.remove(&gone.id);
        }
        missing
    }

    pub(super) fn get(&self, id: i64) -> Option<Sighted> {
        self.objects.get(&id).map(|entry| Sighted { id, last_seen: entry.last_seen })
    }

    /// The latest first.
    pub(super) fn sightings(&self, id: i64) -> Option<Vec<Micros>> {
        self.objects.get(&id).map(|entry| entry.sightings.iter().rev().copied().collect())
    }

    /// In ascending order, from `first` on.
    pub(super) fn from(&self, first: i64) -> impl Iterator<Item = Sighted> {
        let entries = self.objects.range(first..);
        entries.map(|(&id, entry)| Sighted { id, last_seen: entry.last_seen })
    }

    fn remember(&mut self, gone: Sighted) {
        let before = self.gone.insert(gone.id, gone.last_seen);
        if before.is_none() {
            self.gone_at.push_back((Instant::now(), gone.id));
        }
        if self.gone_at.len() > GONE_MAX
            && let Some((_, id)) = self.gone_at.pop_front()
        {
            self.gone.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(id: i64, last_seen: Micros) -> Sighted {
        Sighted { id, last_seen }
    }

    #[test]
    fn what_something_is_to_those_who_knew_of_all_before_depends_on_what_is_known() {
        let mut table = Table::default();
        assert_eq!(table.see(at(1, 10)), Some(Kind::Online));
        assert_eq!(table.see(at(1, 20)), Some(Kind::Seen));
        assert_eq!(table.see(at(1, 20)), None);
        assert_eq!(table.see(at(1, 15)), None);
        assert_eq!(table.leave(at(1, 20)), Some(at(1, 20)));
        assert_eq!(table.leave(at(1, 20)), None);
        assert_eq!(table.leave(at(2, 20)), None);
        assert_eq!(table.len(), 0);
    }

    #[test]
    fn the_order_in_which_consumer_and_routine_are_heard_does_not_matter() {
        // Seen at 20 and deleted as it was then; heard the other way round.
        let mut table = Table::default();
        table.see(at(1, 10));
        assert_eq!(table.leave(at(1, 20)), Some(at(1, 20)));
        assert_eq!(table.see(at(1, 20)), None, "it does not come back from the dead");
        assert_eq!(table.see(at(1, 30)), Some(Kind::Online), "but when it is seen again");
        // Deleted as it was at 20, and seen at 30, which was heard first.
        assert_eq!(table.leave(at(1, 20)), None);
        assert_eq!(table.get(1), Some(at(1, 30)));
    }

    #[test]
    fn after_a_reading_who_was_neither_read_nor_told_of_meanwhile_is_gone() {
        let mut table = Table::default();
        for id in 1..=4 {
            table.see(at(id, 10));
        }
        table.begin_reading();
        table.see(at(1, 10));
        table.see(at(5, 10));
        // Told while the table is read: inserted behind the reader, and deleted in front of it.
        table.see(at(2, 20));
        table.leave(at(3, 10));
        assert_eq!(table.see(at(3, 10)), None);
        assert_eq!(table.end_reading(), [at(4, 10)]);
        assert_eq!(table.from(i64::MIN).map(|seen| seen.id).collect::<Vec<_>>(), [1, 2, 5]);
    }

    #[test]
    fn the_latest_sightings_are_kept_the_latest_first() {
        let mut table = Table::default();
        for time in 1..=50 {
            table.see(at(1, time));
        }
        assert_eq!(table.sightings(1).unwrap(), (31..=50).rev().collect::<Vec<_>>());
        assert_eq!(table.sightings(2), None);
    }
}
