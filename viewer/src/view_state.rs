//! The viewer's copy of the table, and the ring of changes that subscribers follow.
//!
//! One mutex protects both. Code that holds the mutex processes at most [`SCAN_MAX`] objects before
//! it releases the mutex, because a long hold would stall every subscriber.

mod ring;
mod state;
mod table;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use messaging::events::Kind;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::groups::{self, EncodedChange, Follower};
use crate::object::{Micros, Object, as_f64, to_micros};
use state::{Clock, State};

pub(crate) use ring::{Change, Content, TooFarBehind};
pub(crate) use state::{ListRequest, ObjectBatch};
pub(crate) use table::{SIGHTINGS_MAX, Sightings};

/// Minimum interval between publications; changes in between are published together.
const PUBLISH_INTERVAL: Duration = Duration::from_millis(40);
/// With many subscribers, the interval is this time multiplied by their number, because each
/// publication wakes them all.
const PUBLISH_INTERVAL_PER_SUBSCRIBER: Duration = Duration::from_micros(25);
// Decision: docs/decisions/0052-how-long-may-a-request-hold-the-viewers-mutex.md
/// Maximum number of objects to process while holding the mutex.
pub(crate) const SCAN_MAX: usize = 1_024;

/// The state that all requests share.
pub(crate) struct ViewState {
    /// Random for each start of the process, because each start numbers its changes anew.
    epoch: String,
    state: Mutex<State>,
    /// The number of the latest published change.
    published: watch::Sender<u64>,
    changed: Notify,
    /// Whether the whole table has been read once, or an earlier view was restored.
    is_complete: watch::Sender<bool>,
    /// The number of the latest completed reading.
    completed: watch::Sender<u64>,
    /// The view contains the changes of the history up to this position, and perhaps later ones.
    cursor: Mutex<Option<i64>>,
}

/// The next item for a subscriber.
pub(crate) enum NextItem {
    /// The change after the last one that the subscriber has.
    Change(Arc<Change>),
    /// Further objects for the subscriber's list. The list is as of the latest change, which the
    /// subscriber has.
    Objects(ObjectBatch),
    /// The subscriber has everything.
    UpToDate,
}

impl ViewState {
    pub(crate) fn new() -> Self {
        Self {
            epoch: format!("{:016x}", rand::random::<u64>()),
            state: Mutex::default(),
            published: watch::Sender::new(0),
            changed: Notify::new(),
            is_complete: watch::Sender::new(false),
            completed: watch::Sender::new(0),
            cursor: Mutex::default(),
        }
    }

    /// Applies committed changes. Returns the number of objects that changed.
    pub(crate) fn apply(&self, kind: Kind, objects: impl Iterator<Item = Object>) -> usize {
        let mut changed = 0;
        let mut objects = objects.peekable();
        while objects.peek().is_some() {
            let mut state = self.state.lock();
            for object in objects.by_ref().take(SCAN_MAX) {
                let change = match kind {
                    Kind::Online | Kind::Seen => {
                        state.table.mark_seen(object).map(|kind| (kind, object))
                    }
                    Kind::Gone => state.table.mark_gone(object).map(|gone| (Kind::Gone, gone)),
                };
                if let Some((kind, object)) = change {
                    changed += 1;
                    state.queue_change(&self.epoch, kind, object);
                }
            }
        }
        self.changed.notify_one();
        changed
    }

    /// Begins a reading of the table. The caller applies its rows as [`Kind::Seen`].
    pub(crate) fn begin_reading(&self) {
        self.state.lock().table.begin_reading();
    }

    /// Ends the reading: removes objects that were in neither a row nor an event since it began.
    /// Returns their number. `cursor` is a position of the history that was settled before the
    /// reading, if it is known.
    pub(crate) async fn end_reading(&self, cursor: Option<i64>) -> usize {
        let mut removed = 0;
        let mut first = Some(i64::MIN);
        while let Some(from) = first {
            let (count, next) = self.remove_unread(from);
            removed += count;
            first = next;
            tokio::task::yield_now().await;
        }
        if let Some(cursor) = cursor {
            self.set_cursor(cursor);
        }
        self.mark_complete();
        let reading = self.state.lock().table.reading();
        self.completed.send_replace(reading);
        removed
    }

    /// Lets requests and subscribers see the objects.
    pub(crate) fn mark_complete(&self) {
        self.changed.notify_one();
        self.is_complete.send_replace(true);
    }

    /// The number of the latest completed reading.
    pub(crate) fn completed(&self) -> watch::Receiver<u64> {
        self.completed.subscribe()
    }

    /// Records that the view contains the changes of the history up to this position.
    pub(crate) fn set_cursor(&self, position: i64) {
        *self.cursor.lock() = Some(position);
    }

    /// The position in the history up to which the view contains all changes, if it is known.
    pub(crate) fn cursor(&self) -> Option<i64> {
        *self.cursor.lock()
    }

    /// Adds objects of an earlier view. The caller must do this before the view is complete,
    /// because subscribers do not receive these objects as changes.
    pub(crate) fn restore(&self, objects: impl Iterator<Item = (i64, Sightings)>) {
        let mut objects = objects.peekable();
        while objects.peek().is_some() {
            let mut state = self.state.lock();
            for (id, sightings) in objects.by_ref().take(SCAN_MAX) {
                state.table.restore(id, sightings);
            }
        }
    }

    /// Passes the sightings of the next [`SCAN_MAX`] objects from `first` on to `visit`. Returns
    /// the id from which to continue.
    pub(crate) fn visit(&self, first: i64, mut visit: impl FnMut(i64, &Sightings)) -> Option<i64> {
        let state = self.state.lock();
        let mut objects = state.table.sightings_from(first);
        objects.by_ref().take(SCAN_MAX).for_each(|(id, sightings)| visit(id, sightings));
        objects.next().map(|(id, _)| id)
    }

    /// Checks the next [`SCAN_MAX`] objects. Returns the number of removed ones, and the id from
    /// which to continue.
    fn remove_unread(&self, first: i64) -> (usize, Option<i64>) {
        let mut state = self.state.lock();
        let (missing, next) = state.table.remove_unread(first, SCAN_MAX);
        let removed = missing.len();
        for gone in missing {
            state.queue_change(&self.epoch, Kind::Gone, gone);
        }
        (removed, next)
    }

    /// Records that `database` is the current time of the database's clock.
    pub(crate) fn set_clock(&self, database: SystemTime) {
        self.state.lock().clock = Some(Clock { database, read_at: Instant::now() });
    }

    /// The time by the database's clock or, until a reading has shown it, by this machine's clock.
    pub(crate) fn now(&self) -> SystemTime {
        let state = self.state.lock();
        let clock = state.clock.as_ref();
        let now = clock.and_then(|clock| clock.database.checked_add(clock.read_at.elapsed()));
        now.unwrap_or_else(SystemTime::now)
    }

    /// Publishes changes forever, less often with many subscribers. Groups change before
    /// subscribers are woken, so that their changes leave together with those of their objects.
    pub(crate) async fn publish(&self, mut groups: Option<Follower>) -> std::convert::Infallible {
        loop {
            match &mut groups {
                Some(groups) => tokio::select! {
                    () = self.changed.notified() => {}
                    () = groups.wait(to_micros(self.now())) => {}
                },
                None => self.changed.notified().await,
            }
            self.flush();
            let is_redefined = match &mut groups {
                Some(groups) => groups.follow(self).await,
                None => false,
            };
            let last = self.last();
            let is_new =
                |published: &mut u64| std::mem::replace(published, last) != last || is_redefined;
            self.published.send_if_modified(is_new);
            let subscribers = u32::try_from(self.published.receiver_count()).unwrap_or(u32::MAX);
            let interval = PUBLISH_INTERVAL_PER_SUBSCRIBER.saturating_mul(subscribers);
            tokio::time::sleep(PUBLISH_INTERVAL.max(interval)).await;
        }
    }

    /// Adds changes of groups to the ring. The publisher of changes calls this before it wakes the
    /// subscribers.
    pub(crate) fn push_groups(&self, changes: Vec<EncodedChange>) {
        if changes.is_empty() {
            return;
        }
        self.state.lock().ring.push(|sequence| {
            let encoded = groups::encode(&self.event_id(sequence), changes.iter());
            (Content::Groups(changes), encoded)
        });
    }

    /// Moves pending changes into the ring. Returns the number of the latest change.
    pub(crate) fn flush(&self) -> u64 {
        let mut state = self.state.lock();
        state.flush(&self.epoch);
        metrics::gauge!("lastseen_viewer_objects").set(as_f64(state.table.len()));
        state.ring.last()
    }

    /// The number of the latest published change.
    pub(crate) fn published(&self) -> watch::Receiver<u64> {
        self.published.subscribe()
    }

    pub(crate) fn is_complete(&self) -> watch::Receiver<bool> {
        self.is_complete.subscribe()
    }

    pub(crate) fn len(&self) -> usize {
        self.state.lock().table.len()
    }

    /// The number of the latest change in the ring.
    pub(crate) fn last(&self) -> u64 {
        self.state.lock().ring.last()
    }

    /// The item after the change with this number: the next change or, if there is none, objects
    /// that `request` asks for.
    pub(crate) fn next_item(
        &self,
        sequence: u64,
        request: Option<ListRequest<'_>>,
    ) -> Result<NextItem, TooFarBehind> {
        let state = self.state.lock();
        if let Some(change) = state.ring.after(sequence)? {
            return Ok(NextItem::Change(change));
        }
        let list = |request| NextItem::Objects(state.list(request));
        Ok(request.map_or(NextItem::UpToDate, list))
    }

    /// Up to `max` objects with ids from `first` on that were seen at or after `since`, in
    /// ascending order.
    pub(crate) async fn page(&self, first: i64, since: Option<Micros>, max: usize) -> Vec<Object> {
        let mut page = Vec::new();
        let mut next = Some(first);
        while let Some(first) = next
            && page.len() < max
        {
            next = self.scan(first, since, max, &mut page);
            // Let other tasks run during the scan of a large table.
            tokio::task::yield_now().await;
        }
        page
    }

    /// Adds matching objects among the next [`SCAN_MAX`] to `page`, up to `page_max` objects.
    /// Returns the id from which to continue.
    fn scan(
        &self,
        first: i64,
        since: Option<Micros>,
        page_max: usize,
        page: &mut Vec<Object>,
    ) -> Option<i64> {
        let state = self.state.lock();
        let mut last = None;
        for (count, object) in state.table.from(first).enumerate() {
            if count == SCAN_MAX || page.len() == page_max {
                return last.and_then(|id: i64| id.checked_add(1));
            }
            if since.is_none_or(|since| object.last_seen >= since) {
                page.push(object);
            }
            last = Some(object.id);
        }
        None
    }

    /// When each of up to [`SCAN_MAX`] objects was last seen; `None` for those that are not online.
    pub(crate) fn last_seen(&self, ids: &[i64]) -> Vec<Option<Micros>> {
        let state = self.state.lock();
        let ids = ids.iter().take(SCAN_MAX);
        ids.map(|id| state.table.get(*id).map(|object| object.last_seen)).collect()
    }

    /// Up to `max` of these objects, which are in ascending order, with ids from `first` on that
    /// were seen at or after `since`.
    pub(crate) async fn page_of(
        &self,
        ids: &[i64],
        first: i64,
        since: Option<Micros>,
        max: usize,
    ) -> Vec<Object> {
        let mut page = Vec::new();
        let start = ids.partition_point(|id| *id < first);
        for ids in ids[start..].chunks(SCAN_MAX) {
            let seen = ids.iter().zip(self.last_seen(ids));
            let online =
                seen.filter_map(|(&id, last_seen)| Some(Object { id, last_seen: last_seen? }));
            page.extend(online.filter(|seen| since.is_none_or(|since| seen.last_seen >= since)));
            if page.len() >= max {
                break;
            }
            tokio::task::yield_now().await;
        }
        page.truncate(max);
        page
    }

    pub(crate) fn sightings(&self, id: i64) -> Option<(Object, Vec<Micros>)> {
        let state = self.state.lock();
        Some((state.table.get(id)?, state.table.sightings(id)?))
    }

    /// The `id` field of the event for a change.
    pub(crate) fn event_id(&self, sequence: u64) -> String {
        format!("{}-{sequence}", self.epoch)
    }

    /// Parses an event id of this process into the change number and the text after it. Returns
    /// `None` if the ring no longer has the changes after that number.
    pub(crate) fn parse_event_id<'a>(&self, event_id: &'a str) -> Option<(u64, &'a str)> {
        let rest = event_id.strip_prefix(&self.epoch)?.strip_prefix('-')?;
        let (number, rest) = rest.split_once('-').unwrap_or((rest, ""));
        let sequence = number.parse().ok()?;
        self.state.lock().ring.after(sequence).is_ok().then_some((sequence, rest))
    }
}

#[cfg(test)]
mod tests {
    use super::state::OBJECTS_MAX;
    use super::*;

    fn at(id: i64, last_seen: Micros) -> Object {
        Object { id, last_seen }
    }

    /// The kinds and ids of all changes after a number.
    fn published(view: &ViewState, mut after: u64) -> Vec<(Kind, Vec<i64>)> {
        let mut all = Vec::new();
        while let NextItem::Change(change) = view.next_item(after, None).unwrap() {
            if let Content::Objects(kind, objects) = &change.content {
                all.push((*kind, objects.iter().map(|object| object.id).collect()));
            }
            after = change.sequence;
        }
        all
    }

    fn listed(view: &ViewState, first: i64, ids: Option<&[i64]>, limit: usize) -> ObjectBatch {
        match view.next_item(view.last(), Some(ListRequest { first, ids, limit })).unwrap() {
            NextItem::Objects(listed) => listed,
            NextItem::Change(_) | NextItem::UpToDate => panic!("expected objects"),
        }
    }

    #[test]
    fn list_matches_the_latest_change_in_the_ring() {
        let view = ViewState::new();
        view.apply(Kind::Online, [at(1, 10), at(2, 10), at(3, 10)].into_iter());
        view.flush();
        view.apply(Kind::Online, [at(4, 20)].into_iter());
        view.apply(Kind::Gone, [at(2, 10)].into_iter());
        // Neither of the last two changes is published yet, so both come after this list.
        for ids in [None, Some(&[1, 2, 3, 4][..])] {
            let listed = listed(&view, i64::MIN, ids, 100);
            assert_eq!(listed.objects, [at(1, 10), at(2, 10), at(3, 10)], "{ids:?}");
            assert_eq!(listed.next_id, None);
        }
        let before = view.last();
        view.flush();
        assert_eq!(published(&view, before), [(Kind::Gone, vec![2]), (Kind::Online, vec![4])]);
    }

    #[test]
    fn list_continues_where_it_stopped() {
        let view = ViewState::new();
        view.apply(Kind::Online, (0..300).chain([i64::MAX]).map(|id| at(id, 10)));
        view.flush();
        view.apply(Kind::Gone, [at(50, 10), at(299, 10)].into_iter());
        let all: Vec<i64> = (0..300).chain([i64::MAX]).collect();
        for ids in [None, Some(all.as_slice())] {
            let (mut found, mut next) = (Vec::new(), Some(i64::MIN));
            while let Some(first) = next {
                let listed = listed(&view, first, ids, 1_000);
                assert!(listed.objects.len() <= OBJECTS_MAX);
                found.extend(listed.objects.iter().map(|object| object.id));
                next = listed.next_id;
            }
            assert_eq!(found, all);
        }
    }

    #[test]
    fn changes_of_one_object_are_published_in_order() {
        let view = ViewState::new();
        view.apply(Kind::Online, [at(1, 10), at(2, 10)].into_iter());
        view.apply(Kind::Seen, [at(1, 20)].into_iter());
        view.apply(Kind::Gone, [at(2, 10)].into_iter());
        view.apply(Kind::Online, [at(2, 30)].into_iter());
        view.flush();
        let expected = [(Kind::Online, vec![1, 2]), (Kind::Gone, vec![2]), (Kind::Online, vec![2])];
        assert_eq!(published(&view, 0), expected);
    }

    #[test]
    fn only_own_event_ids_within_the_ring_can_be_resumed() {
        let view = ViewState::new();
        view.apply(Kind::Online, [at(1, 10)].into_iter());
        view.flush();
        assert_eq!(view.parse_event_id(&view.event_id(0)), Some((0, "")));
        assert_eq!(view.parse_event_id(&view.event_id(1)), Some((1, "")));
        assert_eq!(view.parse_event_id(&format!("{}-7-5", view.event_id(1))), Some((1, "7-5")));
        assert_eq!(view.parse_event_id(&view.event_id(2)), None);
        for event_id in ["", "1", "-1", &ViewState::new().event_id(1)] {
            assert_eq!(view.parse_event_id(event_id), None, "{event_id}");
        }
    }

    // Field case 2.9
    #[tokio::test]
    async fn no_scan_holds_the_mutex_for_the_whole_table() {
        let view = ViewState::new();
        let objects = i64::try_from(SCAN_MAX).unwrap() * 4;
        view.begin_reading();
        // `apply` takes these objects one by one. `held` counts those that it takes without
        // releasing the mutex.
        let (mut held, mut longest) = (0, 0);
        let online = (0..objects).map(|id| {
            held = if view.state.try_lock().is_none() { held + 1 } else { 0 };
            longest = longest.max(held);
            at(id, 10)
        });
        view.apply(Kind::Online, online);
        assert!(longest < SCAN_MAX, "{longest}");
        view.apply(Kind::Seen, [at(objects - 1, 20)].into_iter());
        let mut page = Vec::new();
        let next = view.scan(i64::MIN, Some(20), 100, &mut page);
        assert_eq!((next, page.len()), (Some(i64::try_from(SCAN_MAX).unwrap()), 0));
        assert_eq!(view.page(i64::MIN, Some(20), 100).await, [at(objects - 1, 20)]);
        assert_eq!(view.page(0, None, 2).await, [at(0, 10), at(1, 10)]);
        assert!(view.state.lock().pending.len() < SCAN_MAX, "pending changes exceed their bound");
        view.flush();
        let offline: Vec<i64> = (objects..2 * objects).collect();
        let next = listed(&view, i64::MIN, Some(&offline), 100).next_id;
        assert_eq!(next, Some(offline[SCAN_MAX]));
        // A reading that finds only one object.
        view.begin_reading();
        view.apply(Kind::Seen, [at(7, 30)].into_iter());
        let scanned = i64::try_from(SCAN_MAX).unwrap();
        assert_eq!(view.remove_unread(i64::MIN), (SCAN_MAX - 1, Some(scanned)));
        view.end_reading(None).await;
        assert_eq!(view.page(i64::MIN, None, 100).await, [at(7, 30)]);
    }
}
