//! What the viewer knows, and whom it tells.

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

/// Changes are told together that come within so long of each other,
const PACE: Duration = Duration::from_millis(40);
/// or, with many subscribers, within so long for each of them: each telling wakes them all.
const PACE_FOR_EACH: Duration = Duration::from_micros(25);
/// Objects in one event.
const OBJECTS_MAX: usize = 1_000;
/// How old a snapshot may be that is given to one more subscriber, with what came after it.
const SNAPSHOT_AGE_MAX: Duration = Duration::from_secs(2);

/// When an object was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sighted {
    pub(crate) id: i64,
    pub(crate) last_seen: Micros,
}

/// All that is known, shared by all who ask.
pub(crate) struct Live {
    /// Of this start: numbers of another mean nothing to us.
    epoch: String,
    state: Mutex<State>,
    /// The number of the latest change that was told.
    told: watch::Sender<u64>,
    to_tell: Notify,
    /// Whether the table was read completely once.
    is_complete: watch::Sender<bool>,
    /// One at a time, so that all who come at once share it.
    snapshot: tokio::sync::Mutex<Option<Snapshot>>,
}

#[derive(Default)]
struct State {
    table: Table,
    /// In the table already, and in the ring soon: the latest of each object.
    pending: BTreeMap<i64, (Kind, Micros)>,
    ring: Ring,
    clock: Option<Clock>,
}

/// What the database's clock said, and when.
struct Clock {
    database: SystemTime,
    read_at: Instant,
}

/// All objects at a moment, as an event.
#[derive(Clone)]
pub(crate) struct Snapshot {
    /// The latest change that is in it.
    pub(crate) sequence: u64,
    pub(crate) encoded: Bytes,
    made_at: Instant,
}

impl Live {
    pub(crate) fn new() -> Self {
        Self {
            epoch: format!("{:016x}", rand::random::<u64>()),
            state: Mutex::default(),
            told: watch::Sender::new(0),
            to_tell: Notify::new(),
            is_complete: watch::Sender::new(false),
            snapshot: tokio::sync::Mutex::default(),
        }
    }

    /// Notes what was committed.
    pub(crate) fn apply(&self, kind: Kind, objects: impl Iterator<Item = Sighted>) {
        let mut state = self.state();
        for object in objects {
            let news = match kind {
                Kind::Online | Kind::Seen => state.table.see(object).map(|kind| (kind, object)),
                Kind::Gone => state.table.leave(object).map(|gone| (Kind::Gone, gone)),
            };
            if let Some((kind, object)) = news {
                state.await_telling(&self.epoch, kind, object);
            }
        }
        drop(state);
        self.to_tell.notify_one();
    }

    /// A reading of the table begins, whose rows are applied as seen, until its end.
    pub(crate) fn begin_reading(&self) {
        self.state().table.begin_reading();
    }

    pub(crate) fn end_reading(&self) {
        let mut state = self.state();
        for gone in state.table.end_reading() {
            state.await_telling(&self.epoch, Kind::Gone, gone);
        }
        drop(state);
        self.to_tell.notify_one();
        self.is_complete.send_replace(true);
    }

    /// What the database's clock says now.
    pub(crate) fn set_clock(&self, database: SystemTime) {
        self.state().clock = Some(Clock { database, read_at: Instant::now() });
    }

    /// What the database's clock says, as far as is known.
    pub(crate) fn now(&self) -> SystemTime {
        let state = self.state();
        let clock = state.clock.as_ref();
        clock.map_or_else(SystemTime::now, |clock| clock.database + clock.read_at.elapsed())
    }

    /// Tells changes for ever, at a pace that many subscribers can be served at.
    pub(crate) async fn tell(&self) -> std::convert::Infallible {
        loop {
            self.to_tell.notified().await;
            let last = {
                let mut state = self.state();
                state.flush(&self.epoch);
                metrics::gauge!("lastseen_viewer_objects").set(as_f64(state.table.len()));
                state.ring.last()
            };
            let is_new = |told: &mut u64| std::mem::replace(told, last) != last;
            self.told.send_if_modified(is_new);
            let subscribers = u32::try_from(self.told.receiver_count()).unwrap_or(u32::MAX);
            tokio::time::sleep(PACE.max(PACE_FOR_EACH.saturating_mul(subscribers))).await;
        }
    }

    /// Changes with each telling.
    pub(crate) fn told(&self) -> watch::Receiver<u64> {
        self.told.subscribe()
    }

    pub(crate) fn is_complete(&self) -> watch::Receiver<bool> {
        self.is_complete.subscribe()
    }

    pub(crate) fn len(&self) -> usize {
        self.state().table.len()
    }

    /// What was told next after the change with that number, if anything was.
    pub(crate) fn after(&self, sequence: u64) -> Result<Option<Arc<Message>>, TooFarBehind> {
        self.state().ring.after(sequence)
    }

    /// Everybody, for one more subscriber.
    pub(crate) async fn snapshot(&self) -> Snapshot {
        let mut snapshot = self.snapshot.lock().await;
        if let Some(made) = &*snapshot
            && made.made_at.elapsed() < SNAPSHOT_AGE_MAX
            && self.after(made.sequence).is_ok()
        {
            return made.clone();
        }
        let (sequence, objects) = self.at_a_moment(|table| table.from(i64::MIN).collect());
        let encoded = self.encode("snapshot", sequence, &objects);
        let made = Snapshot { sequence, encoded, made_at: Instant::now() };
        snapshot.insert(made).clone()
    }

    /// Those of `ids` that are there, for one more subscriber who wants no others.
    pub(crate) fn snapshot_of(&self, ids: &[i64]) -> Snapshot {
        let some = |table: &Table| ids.iter().filter_map(|id| table.get(*id)).collect();
        let (sequence, objects) = self.at_a_moment(some);
        let encoded = self.encode("snapshot", sequence, &objects);
        Snapshot { sequence, encoded, made_at: Instant::now() }
    }

    /// What is in the table, with the number of the latest change that is in it. What is waiting to be
    /// told is in the table already: it is put into the ring first, or it would be told twice.
    fn at_a_moment(&self, read: impl FnOnce(&Table) -> Vec<Sighted>) -> (u64, Vec<Sighted>) {
        let mut state = self.state();
        state.flush(&self.epoch);
        let objects = read(&state.table);
        let sequence = state.ring.last();
        drop(state);
        // Who waits for a change learns of those that were just put into the ring.
        self.to_tell.notify_one();
        (sequence, objects)
    }

    /// Up to `limit` objects in ascending order, from `first` on, and those that were seen since; and
    /// whether there are more.
    pub(crate) fn page(
        &self,
        first: i64,
        since: Option<Micros>,
        limit: usize,
    ) -> (Vec<Sighted>, bool) {
        let state = self.state();
        let mut page: Vec<Sighted> = state
            .table
            .from(first)
            .filter(|seen| since.is_none_or(|since| seen.last_seen >= since))
            .take(limit + 1)
            .collect();
        let more = page.len() > limit;
        page.truncate(limit);
        (page, more)
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

    /// The number in a name, if it is one of ours that can be gone on from.
    pub(crate) fn sequence_of(&self, name: &str) -> Option<u64> {
        let sequence = name.strip_prefix(&self.epoch)?.strip_prefix('-')?.parse().ok()?;
        self.after(sequence).is_ok().then_some(sequence)
    }

    pub(crate) fn encode(&self, event: &str, sequence: u64, objects: &[Sighted]) -> Bytes {
        encode(event, &self.epoch, sequence, objects)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Has it told with the next telling, together with what is told then.
    fn await_telling(&mut self, epoch: &str, kind: Kind, object: Sighted) {
        let Sighted { id, last_seen } = object;
        let kind = match (self.pending.get(&id), kind) {
            // They have not heard of it yet.
            (Some((Kind::Online, _)), Kind::Seen) => Kind::Online,
            // One after the other: told together, there would be no order.
            (Some((Kind::Gone, _)), Kind::Online)
            | (Some((Kind::Online | Kind::Seen, _)), Kind::Gone) => {
                self.flush(epoch);
                kind
            }
            (_, kind) => kind,
        };
        self.pending.insert(id, (kind, last_seen));
    }

    /// Puts what waits into the ring: an event for each kind, or more if there are many objects.
    fn flush(&mut self, epoch: &str) {
        let pending = std::mem::take(&mut self.pending);
        for kind in [Kind::Gone, Kind::Online, Kind::Seen] {
            let of_kind = pending.iter().filter(|(_, (its, _))| *its == kind);
            let objects: Vec<Sighted> =
                of_kind.map(|(&id, &(_, last_seen))| Sighted { id, last_seen }).collect();
            for objects in objects.chunks(OBJECTS_MAX) {
                self.ring.push(kind, objects.to_vec(), |sequence, objects| {
                    encode(kind.name(), epoch, sequence, objects)
                });
            }
        }
    }
}

/// An event as a stream of them has it.
fn encode(event: &str, epoch: &str, sequence: u64, objects: &[Sighted]) -> Bytes {
    let mut text = String::with_capacity(64 + 64 * objects.len());
    // Writing to a text cannot fail.
    let _ = write!(text, "event: {event}\nid: {epoch}-{sequence}\ndata: {{\"objects\":[");
    for (place, object) in objects.iter().enumerate() {
        let comma = if place == 0 { "" } else { "," };
        let (id, last_seen) = (object.id, text_of(object.last_seen));
        let _ = write!(text, "{comma}{{\"id\":{id},\"last_seen\":\"{last_seen}\"}}");
    }
    text.push_str("]}\n\n");
    Bytes::from(text)
}

/// As it is shown.
pub(crate) fn text_of(time: Micros) -> String {
    let since_1970 = Duration::from_micros(time.unsigned_abs());
    events::text_of(if time < 0 {
        SystemTime::UNIX_EPOCH
    } else {
        SystemTime::UNIX_EPOCH + since_1970
    })
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

    /// What was told after a number: kinds and ids.
    fn told(live: &Live, after: u64) -> Vec<(Kind, Vec<i64>)> {
        let mut all = Vec::new();
        let mut after = after;
        while let Some(message) = live.after(after).unwrap() {
            let ids = message.objects.iter().map(|object| object.id).collect();
            all.push((message.kind, ids));
            after = message.sequence;
        }
        all
    }

    #[tokio::test]
    async fn a_snapshot_and_what_comes_after_it_have_each_change_once() {
        let live = Live::new();
        live.apply(Kind::Online, [at(1, 10), at(2, 10)].into_iter());
        let snapshot = live.snapshot().await;
        assert_eq!(told(&live, snapshot.sequence), []);
        let text = String::from_utf8(snapshot.encoded.to_vec()).unwrap();
        assert!(text.contains("\"id\":1,") && text.contains("\"id\":2,"), "{text}");

        live.apply(Kind::Seen, [at(2, 20)].into_iter());
        let again = live.snapshot_of(&[1]);
        assert_eq!(told(&live, snapshot.sequence), [(Kind::Seen, vec![2])]);
        assert_eq!(told(&live, again.sequence), []);
    }

    #[test]
    fn what_is_told_together_is_told_in_the_order_in_which_it_happened_to_each() {
        let live = Live::new();
        live.apply(Kind::Online, [at(1, 10), at(2, 10)].into_iter());
        live.apply(Kind::Seen, [at(1, 20)].into_iter());
        live.apply(Kind::Gone, [at(2, 10)].into_iter());
        live.apply(Kind::Online, [at(2, 30)].into_iter());
        live.snapshot_of(&[]);
        let expected = [(Kind::Online, vec![1, 2]), (Kind::Gone, vec![2]), (Kind::Online, vec![2])];
        assert_eq!(told(&live, 0), expected);
    }

    #[test]
    fn only_names_of_ours_that_the_ring_reaches_can_be_gone_on_from() {
        let live = Live::new();
        live.apply(Kind::Online, [at(1, 10)].into_iter());
        live.snapshot_of(&[]);
        assert_eq!(live.sequence_of(&live.name(0)), Some(0));
        assert_eq!(live.sequence_of(&live.name(1)), Some(1));
        assert_eq!(live.sequence_of(&live.name(2)), None);
        for name in ["", "1", "-1", &Live::new().name(1)] {
            assert_eq!(live.sequence_of(name), None, "{name}");
        }
    }
}
