//! Tracks the unsettled deliveries of a session.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

/// The unsettled deliveries of a session.
#[derive(Default)]
pub(super) struct Unsettled(Mutex<Deliveries>);

#[derive(Default)]
struct Deliveries {
    /// By delivery tag: when the callback arrived, if known.
    accepted_at: HashMap<u64, Option<SystemTime>>,
    /// The newest callback among all deliveries of the session, including settled ones.
    newest: Option<SystemTime>,
}

/// Counts a delivery as unsettled until this is dropped.
pub(super) struct Held {
    unsettled: Arc<Unsettled>,
    tag: u64,
}

impl Unsettled {
    pub(super) fn hold(self: &Arc<Self>, tag: u64, accepted_at: Option<SystemTime>) -> Held {
        let mut deliveries = self.deliveries();
        deliveries.accepted_at.insert(tag, accepted_at);
        deliveries.newest = deliveries.newest.max(accepted_at);
        Held { unsettled: Arc::clone(self), tag }
    }

    pub(super) fn count(&self) -> usize {
        self.deliveries().accepted_at.len()
    }

    /// When the oldest callback of an unsettled delivery arrived.
    pub(super) fn oldest(&self) -> Option<SystemTime> {
        self.deliveries().accepted_at.values().flatten().min().copied()
    }

    /// When the newest callback of any delivery arrived, settled or not. Ready messages are newer,
    /// because the queue is ordered.
    pub(super) fn newest(&self) -> Option<SystemTime> {
        self.deliveries().newest
    }

    fn deliveries(&self) -> MutexGuard<'_, Deliveries> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.unsettled.deliveries().accepted_at.remove(&self.tag);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn oldest_is_of_unsettled_newest_of_all_deliveries() {
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let unsettled = Arc::new(Unsettled::default());
        assert_eq!((unsettled.count(), unsettled.oldest(), unsettled.newest()), (0, None, None));
        let first = unsettled.hold(1, at(10));
        let second = unsettled.hold(2, at(30));
        let _without_time = unsettled.hold(3, None);
        let _third = unsettled.hold(4, at(20));
        assert_eq!((unsettled.count(), unsettled.oldest()), (4, at(10)));
        drop((first, second));
        assert_eq!((unsettled.count(), unsettled.oldest()), (2, at(20)));
        assert_eq!(unsettled.newest(), at(30));
    }
}
