//! What the viewer knows about the table, and the changes that subscribers follow.
//!
//! One mutex protects it all. Nothing holds it for more than [`SCAN_MAX`] objects at a time, whatever the size of
//! the table: a long hold would stall every subscriber.

mod ring;
mod table;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use events::Kind;
use tokio::sync::{Notify, watch};

use ring::Ring;
use table::Table;

pub(crate) use ring::{Message, TooFarBehind};

/// Microseconds since 1970.
pub(crate) type Micros = i64;

/// Changes within this interval of each other are published together,
const PACE: Duration = Duration::from_millis(40);
/// or, with many subscribers, within this interval for each of them: each publication wakes them all.
const PACE_FOR_EACH: Duration = Duration::from_micros(25);
/// Objects in one event. A slow subscriber holds one event besides what its connection buffers.
pub(crate) const OBJECTS_MAX: usize = 128;
// Decision: docs/decisions/0052-how-long-may-a-request-hold-the-viewers-mutex.md
/// Objects that one hold of the mutex looks at.
const SCAN_MAX: usize = 1_024;

/// When an object was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sighted {
    pub(crate) id: i64,
    pub(crate) last_seen: Micros,
}

/// All that is known, shared by all requests.
pub(crate) struct ViewState {
    /// Random for each start of the process: change numbers of another start mean nothing here.
    epoch: String,
    state: Mutex<State>,
    /// The number of the latest published change.
    published: watch::Sender<u64>,
    changed: Notify,
    /// Whether the table was read completely once.
    is_complete: watch::Sender<bool>,
}

#[derive(Default)]
struct State {
    table: Table,
    /// In the table already, and in the ring soon: the latest change of each object. At most [`SCAN_MAX`].
    pending: BTreeMap<i64, (Kind, Micros)>,
    ring: Ring,
    clock: Option<Clock>,
}

/// What the database's clock said, and when.
struct Clock {
    database: SystemTime,
    read_at: Instant,
}

/// What a subscriber gets next.
pub(crate) enum Step {
    /// The change after the last one that it has.
    Change(Arc<Message>),
    /// It has every change: more of the objects that it asked for, as of the last change that it has.
    Listed(Listed),
    /// It has everything.
    UpToDate,
}

/// Some of the objects that are online, in ascending order.
pub(crate) struct Listed {
    pub(crate) objects: Vec<Sighted>,
    /// Where the next ones begin; `None` at the end.
    pub(crate) next: Option<i64>,
}

/// What part of the table a subscriber asks for next.
#[derive(Clone, Copy)]
pub(crate) struct Wanted<'a> {
    pub(crate) first: i64,
    /// These only, in ascending order.
    pub(crate) ids: Option<&'a [i64]>,
    /// At most [`OBJECTS_MAX`] are listed in any case.
    pub(crate) limit: usize,
}

impl ViewState {
    pub(crate) fn new() -> Self {
        Self {
            epoch: format!("{:016x}", rand::random::<u64>()),
            state: Mutex::default(),
            published: watch::Sender::new(0),
            changed: Notify::new(),
            is_complete: watch::Sender::new(false),
        }
    }

    /// Applies what was committed. Returns how many objects that has changed.
    pub(crate) fn apply(&self, kind: Kind, objects: impl Iterator<Item = Sighted>) -> usize {
        let mut changed = 0;
        let mut objects = objects.peekable();
        while objects.peek().is_some() {
            let mut state = self.state();
            for object in objects.by_ref().take(SCAN_MAX) {
                let news = match kind {
                    Kind::Online | Kind::Seen => state.table.see(object).map(|kind| (kind, object)),
                    Kind::Gone => state.table.leave(object).map(|gone| (Kind::Gone, gone)),
                };
                if let Some((kind, object)) = news {
                    changed += 1;
                    state.await_publication(&self.epoch, kind, object);
                }
            }
        }
        self.changed.notify_one();
        changed
    }

    /// A reading of the table begins; its rows are applied as seen, until its end.
    pub(crate) fn begin_reading(&self) {
        self.state().table.begin_reading();
    }

    /// Whatever the reading has not met, and no event since, is gone. Returns how many objects that is.
    pub(crate) async fn end_reading(&self) -> usize {
        let mut removed = 0;
        let mut first = Some(i64::MIN);
        while let Some(from) = first {
            let (missing, next) = self.remove_unread(from);
            removed += missing;
            first = next;
            tokio::task::yield_now().await;
        }
        self.changed.notify_one();
        self.is_complete.send_replace(true);
        removed
    }

    /// Looks at the next [`SCAN_MAX`] objects. Returns how many it has removed, and where to go on.
    fn remove_unread(&self, first: i64) -> (usize, Option<i64>) {
        let mut state = self.state();
        let (missing, next) = state.table.remove_unread(first, SCAN_MAX);
        let removed = missing.len();
        for gone in missing {
            state.await_publication(&self.epoch, Kind::Gone, gone);
        }
        (removed, next)
    }

    /// What the database's clock says now.
    pub(crate) fn set_clock(&self, database: SystemTime) {
        self.state().clock = Some(Clock { database, read_at: Instant::now() });
    }

    /// What the database's clock says, as far as is known.
    pub(crate) fn now(&self) -> SystemTime {
        let state = self.state();
        let clock = state.clock.as_ref();
        let read = clock.and_then(|clock| clock.database.checked_add(clock.read_at.elapsed()));
        read.unwrap_or_else(SystemTime::now)
    }

    /// Publishes changes forever, at a pace that many subscribers can be served at.
    pub(crate) async fn publish(&self) -> std::convert::Infallible {
        loop {
            self.changed.notified().await;
            let last = self.flush();
            let is_new = |published: &mut u64| std::mem::replace(published, last) != last;
            self.published.send_if_modified(is_new);
            let subscribers = u32::try_from(self.published.receiver_count()).unwrap_or(u32::MAX);
            tokio::time::sleep(PACE.max(PACE_FOR_EACH.saturating_mul(subscribers))).await;
        }
    }

    /// Puts pending changes into the ring. Returns the number of the latest change.
    pub(crate) fn flush(&self) -> u64 {
        let mut state = self.state();
        state.flush(&self.epoch);
        metrics::gauge!("lastseen_viewer_objects").set(as_f64(state.table.len()));
        state.ring.last()
    }

    /// Changes with each publication.
    pub(crate) fn published(&self) -> watch::Receiver<u64> {
        self.published.subscribe()
    }

    pub(crate) fn is_complete(&self) -> watch::Receiver<bool> {
        self.is_complete.subscribe()
    }

    pub(crate) fn len(&self) -> usize {
        self.state().table.len()
    }

    /// The number of the latest change in the ring.
    pub(crate) fn last(&self) -> u64 {
        self.state().ring.last()
    }

    /// What comes after the change with this number: the next change, or else some of the objects that are wanted.
    pub(crate) fn step(
        &self,
        sequence: u64,
        wanted: Option<Wanted<'_>>,
    ) -> Result<Step, TooFarBehind> {
        let state = self.state();
        if let Some(message) = state.ring.after(sequence)? {
            return Ok(Step::Change(message));
        }
        Ok(wanted.map_or(Step::UpToDate, |wanted| Step::Listed(state.list(wanted))))
    }

    /// Up to `limit` objects in ascending order, from `first` on, that were seen since; and whether there are more.
    pub(crate) async fn page(
        &self,
        first: i64,
        since: Option<Micros>,
        limit: usize,
    ) -> (Vec<Sighted>, bool) {
        let mut page = Vec::new();
        let mut next = Some(first);
        while let Some(first) = next {
            if page.len() > limit {
                break;
            }
            next = self.scan(first, since, limit + 1, &mut page);
            // A scan of a large table takes turns with everything else that runs.
            tokio::task::yield_now().await;
        }
        let more = page.len() > limit;
        page.truncate(limit);
        (page, more)
    }

    /// Adds to `page` what it finds among the next [`SCAN_MAX`] objects. Returns where to go on.
    fn scan(
        &self,
        first: i64,
        since: Option<Micros>,
        most: usize,
        page: &mut Vec<Sighted>,
    ) -> Option<i64> {
        let state = self.state();
        let mut last = None;
        for (count, seen) in state.table.from(first).enumerate() {
            if count == SCAN_MAX || page.len() == most {
                return last.and_then(after);
            }
            if since.is_none_or(|since| seen.last_seen >= since) {
                page.push(seen);
            }
            last = Some(seen.id);
        }
        None
    }

    pub(crate) fn get(&self, id: i64) -> Option<Sighted> {
        self.state().table.get(id)
    }

    pub(crate) fn sightings(&self, id: i64) -> Option<(Sighted, Vec<Micros>)> {
        let state = self.state();
        Some((state.table.get(id)?, state.table.sightings(id)?))
    }

    /// The number of a change as subscribers know it.
    pub(crate) fn name(&self, sequence: u64) -> String {
        format!("{}-{sequence}", self.epoch)
    }

    /// The number at the start of a name that this process has given, if the ring still reaches it; and what
    /// follows the number.
    pub(crate) fn sequence_of<'a>(&self, name: &'a str) -> Option<(u64, &'a str)> {
        let rest = name.strip_prefix(&self.epoch)?.strip_prefix('-')?;
        let (number, rest) = rest.split_once('-').unwrap_or((rest, ""));
        let sequence = number.parse().ok()?;
        self.state().ring.after(sequence).is_ok().then_some((sequence, rest))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Has it published with the next publication, together with what is published then.
    fn await_publication(&mut self, epoch: &str, kind: Kind, object: Sighted) {
        let Sighted { id, last_seen } = object;
        let kind = match (self.pending.get(&id), kind) {
            // Subscribers do not know of it yet.
            (Some((Kind::Online, _)), Kind::Seen) => Kind::Online,
            // One after the other: published together, there would be no order.
            (Some((Kind::Gone, _)), Kind::Online)
            | (Some((Kind::Online | Kind::Seen, _)), Kind::Gone) => {
                self.flush(epoch);
                kind
            }
            (_, kind) => kind,
        };
        self.pending.insert(id, (kind, last_seen));
        if self.pending.len() >= SCAN_MAX {
            self.flush(epoch);
        }
    }

    /// Puts pending changes into the ring: an event for each kind, or more if there are many objects.
    fn flush(&mut self, epoch: &str) {
        let pending = std::mem::take(&mut self.pending);
        for kind in [Kind::Gone, Kind::Online, Kind::Seen] {
            let of_kind = pending.iter().filter(|(_, (its, _))| *its == kind);
            let objects: Vec<Sighted> =
                of_kind.map(|(&id, &(_, last_seen))| Sighted { id, last_seen }).collect();
            for objects in objects.chunks(OBJECTS_MAX) {
                self.ring.push(kind, objects.to_vec(), |sequence, objects| {
                    encode(kind.name(), &format!("{epoch}-{sequence}"), objects, None)
                });
            }
        }
    }

    /// What is online as of the latest change in the ring. The table is ahead of that by what is pending, which
    /// is undone here: a subscriber will be sent it as a change, and must not get it twice.
    fn list(&self, wanted: Wanted<'_>) -> Listed {
        let most = wanted.limit.min(OBJECTS_MAX);
        match wanted.ids {
            None => self.list_all(wanted.first, most),
            Some(ids) => self.list_some(wanted.first, ids, most),
        }
    }

    fn list_all(&self, first: i64, most: usize) -> Listed {
        let is_known =
            |seen: &Sighted| !matches!(self.pending.get(&seen.id), Some((Kind::Online, _)));
        // One more than may be listed shows that there is more.
        let enough = most.saturating_add(1);
        let known = self.table.from(first).filter(is_known);
        let mut objects: Vec<Sighted> = known.take(enough).collect();
        // Those that have just gone are not in the table, and belong in between.
        let end = objects.get(most).map_or(i64::MAX, |last| last.id);
        let gone = self.pending.range(first..=end);
        let gone = gone.filter(|(_, (kind, _))| *kind == Kind::Gone);
        objects.extend(gone.map(|(&id, &(_, last_seen))| Sighted { id, last_seen }));
        objects.sort_unstable_by_key(|seen| seen.id);
        let next = objects.get(most).map(|seen| seen.id);
        objects.truncate(most);
        Listed { objects, next }
    }

    fn list_some(&self, first: i64, ids: &[i64], most: usize) -> Listed {
        let place = ids.partition_point(|id| *id < first);
        let mut objects = Vec::new();
        for (count, &id) in ids.iter().skip(place).enumerate() {
            if count == SCAN_MAX || objects.len() == most {
                return Listed { objects, next: Some(id) };
            }
            objects.extend(match self.pending.get(&id) {
                Some((Kind::Online, _)) => None,
                Some(&(Kind::Gone, last_seen)) => Some(Sighted { id, last_seen }),
                Some((Kind::Seen, _)) | None => self.table.get(id),
            });
        }
        Listed { objects, next: None }
    }
}

/// The next id, if there is a greater one.
fn after(id: i64) -> Option<i64> {
    id.checked_add(1)
}

/// An event as a stream has it. `remaining` is a field of some events.
pub(crate) fn encode(
    event: &str,
    name: &str,
    objects: &[Sighted],
    remaining: Option<&'static str>,
) -> Bytes {
    let mut text = String::with_capacity(128 + 64 * objects.len());
    // Writing to a string cannot fail.
    let _ = write!(text, "event: {event}\nid: {name}\ndata: {{\"objects\":[");
    for (place, object) in objects.iter().enumerate() {
        let comma = if place == 0 { "" } else { "," };
        let (id, last_seen) = (object.id, text_of(object.last_seen));
        let _ = write!(text, "{comma}{{\"id\":\"{id}\",\"last_seen\":\"{last_seen}\"}}");
    }
    text.push(']');
    if let Some(remaining) = remaining {
        let _ = write!(text, ",\"remaining\":\"{remaining}\"");
    }
    text.push_str("}\n\n");
    // It may be held for as long as a slow subscriber takes.
    text.shrink_to_fit();
    Bytes::from(text)
}

/// A time as the API shows it.
pub(crate) fn text_of(time: Micros) -> String {
    let since_1970 = Duration::from_micros(time.unsigned_abs());
    let time = if time < 0 { None } else { SystemTime::UNIX_EPOCH.checked_add(since_1970) };
    events::format_time(time.unwrap_or(SystemTime::UNIX_EPOCH))
}

pub(crate) fn micros_of(time: SystemTime) -> Micros {
    let since_1970 = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_1970.as_micros()).unwrap_or(i64::MAX)
}

#[expect(clippy::cast_precision_loss, reason = "nothing is counted here beyond 2^53")]
pub(crate) fn as_f64(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(id: i64, last_seen: Micros) -> Sighted {
        Sighted { id, last_seen }
    }

    /// What was published after a number: kinds and ids.
    fn published(view: &ViewState, after: u64) -> Vec<(Kind, Vec<i64>)> {
        let mut all = Vec::new();
        let mut after = after;
        while let Step::Change(message) = view.step(after, None).unwrap() {
            let ids = message.objects.iter().map(|object| object.id).collect();
            all.push((message.kind, ids));
            after = message.sequence;
        }
        all
    }

    fn listed(view: &ViewState, first: i64, ids: Option<&[i64]>, limit: usize) -> Listed {
        match view.step(view.last(), Some(Wanted { first, ids, limit })).unwrap() {
            Step::Listed(listed) => listed,
            Step::Change(_) | Step::UpToDate => panic!("a list was expected"),
        }
    }

    #[test]
    fn a_list_is_as_of_the_latest_change_in_the_ring() {
        let view = ViewState::new();
        view.apply(Kind::Online, [at(1, 10), at(2, 10), at(3, 10)].into_iter());
        view.flush();
        view.apply(Kind::Online, [at(4, 20)].into_iter());
        view.apply(Kind::Gone, [at(2, 10)].into_iter());
        // Neither is published yet, so both come as changes after this list.
        for ids in [None, Some(&[1, 2, 3, 4][..])] {
            let listed = listed(&view, i64::MIN, ids, 100);
            assert_eq!(listed.objects, [at(1, 10), at(2, 10), at(3, 10)], "{ids:?}");
            assert_eq!(listed.next, None);
        }
        let before = view.last();
        view.flush();
        assert_eq!(published(&view, before), [(Kind::Gone, vec![2]), (Kind::Online, vec![4])]);
    }

    #[test]
    fn a_list_goes_on_where_it_stopped() {
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
                found.extend(listed.objects.iter().map(|seen| seen.id));
                next = listed.next;
            }
            assert_eq!(found, all);
        }
    }

    #[test]
    fn changes_of_one_object_are_published_in_their_order() {
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
    fn only_names_of_ours_that_the_ring_reaches_can_be_resumed() {
        let view = ViewState::new();
        view.apply(Kind::Online, [at(1, 10)].into_iter());
        view.flush();
        assert_eq!(view.sequence_of(&view.name(0)), Some((0, "")));
        assert_eq!(view.sequence_of(&view.name(1)), Some((1, "")));
        assert_eq!(view.sequence_of(&format!("{}-7-5", view.name(1))), Some((1, "7-5")));
        assert_eq!(view.sequence_of(&view.name(2)), None);
        for name in ["", "1", "-1", &ViewState::new().name(1)] {
            assert_eq!(view.sequence_of(name), None, "{name}");
        }
    }

    // Field case 2.9
    #[tokio::test]
    async fn no_scan_holds_the_mutex_for_the_whole_table() {
        let view = ViewState::new();
        let objects = i64::try_from(SCAN_MAX).unwrap() * 4;
        view.begin_reading();
        let (mut held, mut longest) = (0, 0);
        let online = (0..objects).map(|id| {
            held = if view.state.try_lock().is_err() { held + 1 } else { 0 };
            longest = longest.max(held);
            at(id, 10)
        });
        view.apply(Kind::Online, online);
        assert!(longest < SCAN_MAX, "{longest}");
        view.apply(Kind::Seen, [at(objects - 1, 20)].into_iter());
        let mut page = Vec::new();
        let next = view.scan(i64::MIN, Some(20), 100, &mut page);
        assert_eq!((next, page.len()), (Some(i64::try_from(SCAN_MAX).unwrap()), 0));
        assert_eq!(view.page(i64::MIN, Some(20), 100).await, (vec![at(objects - 1, 20)], false));
        assert_eq!(view.page(0, None, 2).await, (vec![at(0, 10), at(1, 10)], true));
        assert!(view.state().pending.len() < SCAN_MAX, "a flush is bounded, too");
        view.flush();
        let offline: Vec<i64> = (objects..2 * objects).collect();
        let next = listed(&view, i64::MIN, Some(&offline), 100).next;
        assert_eq!(next, Some(offline[SCAN_MAX]));
        // A reading that met only one of them.
        view.begin_reading();
        view.apply(Kind::Seen, [at(7, 30)].into_iter());
        let scanned = i64::try_from(SCAN_MAX).unwrap();
        assert_eq!(view.remove_unread(i64::MIN), (SCAN_MAX - 1, Some(scanned)));
        view.end_reading().await;
        assert_eq!(view.page(i64::MIN, None, 100).await, (vec![at(7, 30)], false));
    }
}
