//! The connections that wait for a request.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

/// The connections that wait for a request, in the order in which they began to, so that the server can
/// close the one that has waited longest when it needs room for another.
#[derive(Default)]
pub(super) struct Waiting(Mutex<Entries>);

#[derive(Default)]
struct Entries {
    next: u64,
    by_age: BTreeMap<u64, Entry>,
}

struct Entry {
    since: Instant,
    evicted: Arc<Notify>,
}

/// Names an entry.
pub(super) struct Ticket(u64);

impl Waiting {
    /// Adds a connection, which must close when `evicted` is notified while it still waits.
    pub(super) fn enter(&self, since: Instant, evicted: &Arc<Notify>) -> Ticket {
        let mut entries = self.lock();
        let number = entries.next;
        entries.next += 1;
        entries.by_age.insert(number, Entry { since, evicted: Arc::clone(evicted) });
        Ticket(number)
    }

    /// Removes a connection.
    pub(super) fn leave(&self, ticket: &Ticket) {
        self.lock().by_age.remove(&ticket.0);
    }

    /// Since when the oldest entry waits.
    pub(super) fn oldest(&self) -> Option<Instant> {
        Some(self.lock().by_age.first_key_value()?.1.since)
    }

    /// Has the oldest entry closed, if it has waited for at least `least`.
    pub(super) fn evict(&self, least: Duration) {
        let mut entries = self.lock();
        if let Some(oldest) = entries.by_age.first_entry()
            && oldest.get().since.elapsed() >= least
        {
            oldest.remove().evicted.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
