//! The connections that wait for a request.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

/// The connections that wait for a request, ordered by the start of the wait, so that the server
/// can close the one that has waited longest when it needs its slot for a new connection.
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

/// Identifies an entry.
pub(super) struct EntryId(u64);

impl IdleConnections {
    /// Adds a connection. When `evicted` is notified, it must close unless it no longer waits.
    pub(super) fn add(&self, since: Instant, evicted: &Arc<Notify>) -> EntryId {
        let mut entries = self.lock();
        let id = entries.next_id;
        entries.next_id += 1;
        entries.by_age.insert(id, Entry { since, evicted: Arc::clone(evicted) });
        EntryId(id)
    }

    pub(super) fn remove(&self, id: &EntryId) {
        self.lock().by_age.remove(&id.0);
    }

    /// When the oldest entry began to wait.
    pub(super) fn oldest(&self) -> Option<Instant> {
        Some(self.lock().by_age.first_key_value()?.1.since)
    }

    /// Closes the connection that has waited longest, if it has waited for at least `min_wait`.
    pub(super) fn evict_oldest(&self, min_wait: Duration) {
        let mut entries = self.lock();
        if let Some(oldest) = entries.by_age.first_entry()
            && oldest.get().since.elapsed() >= min_wait
        {
            oldest.remove().evicted.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
