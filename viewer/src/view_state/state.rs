//! What the mutex protects: the table, the changes that are not published yet, and the ring.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use messaging::events::Kind;

use super::SCAN_MAX;
use super::ring::{Content, Ring};
use super::table::Table;
use crate::object::{Micros, Object, encode};

/// Maximum number of objects in one event. A slow subscriber holds one event in memory, in addition
/// to the buffers of its connection.
pub(super) const OBJECTS_MAX: usize = 128;

#[derive(Default)]
pub(super) struct State {
    pub(super) table: Table,
    /// Changes that the table has but the ring does not: the latest one of each object. At most
    /// [`SCAN_MAX`].
    pub(super) pending: BTreeMap<i64, (Kind, Micros)>,
    pub(super) ring: Ring,
    pub(super) clock: Option<Clock>,
}

/// A reading of the database's clock.
pub(super) struct Clock {
    pub(super) database: SystemTime,
    pub(super) read_at: Instant,
}

/// Some of the objects that are online, in ascending order of the ids.
pub(crate) struct ObjectBatch {
    pub(crate) objects: Vec<Object>,
    /// The id from which to continue; `None` at the end.
    pub(crate) next_id: Option<i64>,
}

/// The part of the table that a subscriber needs next.
#[derive(Clone, Copy)]
pub(crate) struct ListRequest<'a> {
    /// The lowest id.
    pub(crate) first: i64,
    /// Only these ids, in ascending order.
    pub(crate) ids: Option<&'a [i64]>,
    /// Maximum number of objects; never more than [`OBJECTS_MAX`] are listed.
    pub(crate) limit: usize,
}

impl State {
    /// Adds a change to the next publication.
    pub(super) fn queue_change(&mut self, epoch: &str, kind: Kind, object: Object) {
        let Object { id, last_seen } = object;
        let kind = match (self.pending.get(&id), kind) {
            // Subscribers have not received the object yet.
            (Some((Kind::Online, _)), Kind::Seen) => Kind::Online,
            // Publish the pending change first: the order of both matters, and changes that are
            // published together have no order.
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

    /// Moves pending changes into the ring: one event for each kind, or several if there are more
    /// than [`OBJECTS_MAX`] objects.
    pub(super) fn flush(&mut self, epoch: &str) {
        let pending = std::mem::take(&mut self.pending);
        for kind in [Kind::Gone, Kind::Online, Kind::Seen] {
            let of_kind = pending.iter().filter(|(_, (pending_kind, _))| *pending_kind == kind);
            let objects: Vec<Object> =
                of_kind.map(|(&id, &(_, last_seen))| Object { id, last_seen }).collect();
            for objects in objects.chunks(OBJECTS_MAX) {
                self.ring.push(|sequence| {
                    let event_id = format!("{epoch}-{sequence}");
                    let encoded = encode(kind.name(), &event_id, objects, None);
                    (Content::Objects(kind, objects.to_vec()), encoded)
                });
            }
        }
    }

    /// Lists objects that are online as of the latest change in the ring. The table already
    /// contains the pending changes, so this function undoes them: a subscriber will get them as
    /// changes, and must not get them twice.
    pub(super) fn list(&self, request: ListRequest<'_>) -> ObjectBatch {
        let max = request.limit.min(OBJECTS_MAX);
        match request.ids {
            None => self.list_all(request.first, max),
            Some(ids) => self.list_some(request.first, ids, max),
        }
    }

    fn list_all(&self, first: i64, max: usize) -> ObjectBatch {
        let is_published =
            |object: &Object| !matches!(self.pending.get(&object.id), Some((Kind::Online, _)));
        // One object more than `max` shows that there are more.
        let published = self.table.from(first).filter(is_published);
        let mut objects: Vec<Object> = published.take(max.saturating_add(1)).collect();
        // Objects with a pending `Gone` are no longer in the table, but belong on the list.
        let end = objects.get(max).map_or(i64::MAX, |last| last.id);
        let gone = self.pending.range(first..=end);
        let gone = gone.filter(|(_, (kind, _))| *kind == Kind::Gone);
        objects.extend(gone.map(|(&id, &(_, last_seen))| Object { id, last_seen }));
        objects.sort_unstable_by_key(|object| object.id);
        let next_id = objects.get(max).map(|object| object.id);
        objects.truncate(max);
        ObjectBatch { objects, next_id }
    }

    fn list_some(&self, first: i64, ids: &[i64], max: usize) -> ObjectBatch {
        let start = ids.partition_point(|id| *id < first);
        let mut objects = Vec::new();
        for (count, &id) in ids.iter().skip(start).enumerate() {
            if count == SCAN_MAX || objects.len() == max {
                return ObjectBatch { objects, next_id: Some(id) };
            }
            objects.extend(match self.pending.get(&id) {
                Some((Kind::Online, _)) => None,
                Some(&(Kind::Gone, last_seen)) => Some(Object { id, last_seen }),
                Some((Kind::Seen, _)) | None => self.table.get(id),
            });
        }
        ObjectBatch { objects, next_id: None }
    }
}
