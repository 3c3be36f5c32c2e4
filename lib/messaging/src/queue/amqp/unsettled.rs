//! Tracks the unsettled deliveries of a session.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

#[derive(Default)]
pub(super) struct Unsettled(Mutex<Deliveries>);

#[derive(Default)]
struct Deliveries {
    /// When the callback of each delivery arrived, if known; by delivery tag.
    accepted_at: HashMap<u64, Option<SystemTime>>,
    /// When the newest callback of all deliveries of the session arrived, settled or not.
    newest: Option<SystemTime>,
}

/// Counts a delivery as unsettled until the guard is dropped.
pub(super) struct UnsettledGuard {
    unsettled: Arc<Unsettled>,
    tag: u64,
}

impl Unsettled {
    pub(super) fn track(
        self: &Arc<Self>,
        tag: u64,
        accepted_at: Option<SystemTime>,
    ) -> UnsettledGuard {
        let mut deliveries = self.0.lock();
        deliveries.accepted_at.insert(tag, accepted_at);
        deliveries.newest = deliveries.newest.max(accepted_at);
        UnsettledGuard { unsettled: Arc::clone(self), tag }
    }

    pub(super) fn count(&self) -> usize {
        self.0.lock().accepted_at.len()
    }

    /// When the oldest callback of an unsettled delivery arrived.
    pub(super) fn oldest(&self) -> Option<SystemTime> {
        self.0.lock().accepted_at.values().flatten().min().copied()
    }

    // Decision: docs/decisions/0016-how-is-the-age-of-the-oldest-message-measured.md
    /// When the newest callback of any delivery arrived, settled or not. Because the queue is
    /// ordered, a ready message was put into it later. Its callback may have arrived earlier, if the
    /// message has returned to the queue (a retry, a requeued message, a redriven dead letter) or
    /// comes from a spool.
    pub(super) fn newest(&self) -> Option<SystemTime> {
        self.0.lock().newest
    }
}

impl Drop for UnsettledGuard {
    fn drop(&mut self) {
        self.unsettled.0.lock().accepted_at.remove(&self.tag);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn oldest_counts_unsettled_deliveries_newest_counts_all() {
        let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let unsettled = Arc::new(Unsettled::default());
        assert_eq!((unsettled.count(), unsettled.oldest(), unsettled.newest()), (0, None, None));
        let first = unsettled.track(1, at(10));
        let second = unsettled.track(2, at(30));
        let _without_time = unsettled.track(3, None);
        let _third = unsettled.track(4, at(20));
        assert_eq!((unsettled.count(), unsettled.oldest()), (4, at(10)));
        drop((first, second));
        assert_eq!((unsettled.count(), unsettled.oldest()), (2, at(20)));
        assert_eq!(unsettled.newest(), at(30));
    }
}
