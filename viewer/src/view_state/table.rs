//! The table, as far as is known from readings and events.
//!
//! Decision: docs/decisions/0050-how-does-the-viewer-order-events.md

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant};

use events::Kind;

use super::{Micros, Sighted};

/// The sightings that are kept of an object.
const SIGHTINGS_MAX: usize = 20;
/// How long an object is remembered as gone: a sighting from before that arrives within this time is not taken for
/// a return.
const GONE_FOR: Duration = Duration::from_mins(2);
/// The most of them; beyond it, the first are forgotten.
const GONE_MAX: usize = 200_000;

#[derive(Default)]
pub(super) struct Table {
    objects: BTreeMap<i64, Entry>,
    gone: HashMap<i64, Gone>,
    /// In the order in which they went.
    gone_at: VecDeque<(Instant, i64)>,
    reading: u64,
}

struct Entry {
    last_seen: Micros,
    /// The latest last.
    sightings: VecDeque<Micros>,
    /// The reading of the table that was under way, or over, at the latest event or row about it.
    heard_in: u64,
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

    /// It was seen at that moment. Returns what that is to a subscriber that knows everything before; nothing if it
    /// is no news.
    pub(super) fn see(&mut self, seen: Sighted) -> Option<Kind> {
        let Sighted { id, last_seen } = seen;
        // An event that came late, or a row that was read before it was deleted.
        let is_old = |gone: &Gone| last_seen <= gone.last_seen && gone.at.elapsed() < GONE_FOR;
        if self.gone.get(&id).is_some_and(is_old) {
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

    /// It was deleted as it was at that moment. Returns whether that is news: it is none if the object has been seen
    /// since.
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
    }

    /// The reading is over: an object that was not in it, and had no event meanwhile, is gone. Looks at up to `most`
    /// objects from `first` on. Returns those that are gone, and where to go on.
    pub(super) fn remove_unread(&mut self, first: i64, most: usize) -> (Vec<Sighted>, Option<i64>) {
        let reading = self.reading;
        let mut entries = self.objects.range(first..);
        let looked_at = entries.by_ref().take(most);
        let missing = looked_at.filter(|(_, entry)| entry.heard_in < reading);
        let missing: Vec<Sighted> =
            missing.map(|(&id, entry)| Sighted { id, last_seen: entry.last_seen }).collect();
        let next = entries.next().map(|(&id, _)| id);
        for gone in &missing {
            self.objects.remove(&gone.id);
        }
        (missing, next)
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
        let at = Instant::now();
        self.gone.insert(gone.id, Gone { last_seen: gone.last_seen, at });
        self.gone_at.push_back((at, gone.id));
        // Two for each one that is added: it shrinks again without a pass over all of them.
        for _ in 0..2 {
            let is_over = |(at, _): &(Instant, i64)| at.elapsed() >= GONE_FOR;
            if self.gone_at.len() <= GONE_MAX && !self.gone_at.front().is_some_and(is_over) {
                break;
            }
            let Some((at, id)) = self.gone_at.pop_front() else { break };
            // It may have gone once more since.
            if self.gone.get(&id).is_some_and(|gone| gone.at == at) {
                self.gone.remove(&id);
            }
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
    fn a_sighting_is_news_if_it_is_later_than_what_is_known() {
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
    fn the_order_of_events_of_consumer_and_routine_is_irrelevant() {
        // Seen at 20 and deleted as it was then; the events arrive in the other order.
        let mut table = Table::default();
        table.see(at(1, 10));
        assert_eq!(table.leave(at(1, 20)), Some(at(1, 20)));
        assert_eq!(table.see(at(1, 20)), None, "an old sighting brings nothing back");
        assert_eq!(table.see(at(1, 30)), Some(Kind::Online), "a later one does");
        // Deleted as it was at 20, and seen at 30, whose event came first.
        assert_eq!(table.leave(at(1, 20)), None);
        assert_eq!(table.get(1), Some(at(1, 30)));
    }

    #[test]
    fn an_object_without_row_or_event_in_a_reading_is_gone() {
        let mut table = Table::default();
        for id in 1..=4 {
            table.see(at(id, 10));
        }
        table.begin_reading();
        table.see(at(1, 10));
        table.see(at(5, 10));
        // Events while the table is read: inserted behind the reader, and deleted in front of it.
        table.see(at(2, 20));
        table.leave(at(3, 10));
        assert_eq!(table.see(at(3, 10)), None);
        assert_eq!(table.remove_unread(i64::MIN, 2), (Vec::new(), Some(4)));
        assert_eq!(table.remove_unread(4, 2), (vec![at(4, 10)], None));
        assert_eq!(table.from(i64::MIN).map(|seen| seen.id).collect::<Vec<_>>(), [1, 2, 5]);
    }

    #[test]
    fn the_latest_20_sightings_are_kept_the_latest_first() {
        let mut table = Table::default();
        for time in 1..=50 {
            table.see(at(1, time));
        }
        assert_eq!(table.sightings(1).unwrap(), (31..=50).rev().collect::<Vec<_>>());
        assert_eq!(table.sightings(2), None);
    }
}
