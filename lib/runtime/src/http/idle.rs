//! The connections that wait for a request.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

/// The connections that wait for a request, ordered by the start of the wait. When the server needs
/// a slot for a new connection, it closes the connection that has waited longest.
#[derive(Default)]
pub(super) struct IdleConnections(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    next_id: u64,
    by_age: BTreeMap<u64, Entry>,
}

struct Entry {
    since: Instant,
    evicted: Arc<Notify>,
}

pub(super) type EntryId = u64;

impl IdleConnections {
    /// Adds a connection that began to wait at `since`. When `evicted` is notified, the connection
    /// must close, unless a request has arrived in the meantime.
    pub(super) fn add(&self, since: Instant, evicted: &Arc<Notify>) -> EntryId {
        let mut entries = self.0.lock();
        let id = entries.next_id;
        entries.next_id += 1;
        entries.by_age.insert(id, Entry { since, evicted: Arc::clone(evicted) });
        id
    }

    pub(super) fn remove(&self, id: EntryId) {
        self.0.lock().by_age.remove(&id);
    }

    /// When the oldest entry began to wait.
    pub(super) fn oldest(&self) -> Option<Instant> {
        Some(self.0.lock().by_age.first_key_value()?.1.since)
    }

    /// Closes the connection that has waited longest, if it has waited for at least `min_wait`.
    pub(super) fn evict_oldest(&self, min_wait: Duration) {
        let mut entries = self.0.lock();
        if let Some(oldest) = entries.by_age.first_entry()
            && oldest.get().since.elapsed() >= min_wait
        {
            oldest.remove().evicted.notify_one();
        }
    }
}
