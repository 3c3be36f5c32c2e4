//! Room for so many at once, which may change while some have it.
//!
//! Decision: docs/decisions/0025-how-does-max-consumers-change-at-run-time.md

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Semaphore;

/// How many may be at once. Who waits for room is served in order.
pub(crate) struct Room {
    free: Semaphore,
    size: Mutex<Size>,
}

struct Size {
    limit: usize,
    /// How many permits there are, taken or not: more than the limit while it has fallen and those that
    /// are taken have not come back.
    granted: usize,
}

/// Room for one, given back when it is dropped.
pub(crate) struct Permit(Arc<Room>);

impl Room {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let size = Mutex::new(Size { limit, granted: limit });
        Arc::new(Self { free: Semaphore::new(limit), size })
    }

    /// Waits for room.
    pub(crate) async fn enter(self: &Arc<Self>) -> Permit {
        // It is never closed; and if it were, there would only be no bound.
        if let Ok(permit) = self.free.acquire().await {
            permit.forget();
        }
        Permit(Arc::clone(self))
    }

    /// From now on there is room for so many. Those that have it keep it, and so may the first of those that
    /// wait, if room for it has come free just now.
    pub(crate) fn resize(&self, limit: usize) {
        let mut size = self.size();
        size.limit = limit;
        let surplus = size.granted.saturating_sub(limit);
        size.granted -= self.free.forget_permits(surplus);
        self.fill(&mut size);
    }

    /// Lets one more in, whatever the limit.
    pub(crate) fn admit_one(&self) {
        self.size().granted += 1;
        self.free.add_permits(1);
    }

    /// For how many there is room right now.
    pub(crate) fn free(&self) -> usize {
        self.free.available_permits()
    }

    fn fill(&self, size: &mut Size) {
        let missing = size.limit.saturating_sub(size.granted);
        size.granted += missing;
        self.free.add_permits(missing);
    }

    fn size(&self) -> MutexGuard<'_, Size> {
        self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut size = self.0.size();
        size.granted -= 1;
        self.0.fill(&mut size);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn entered(room: &Arc<Room>) -> Option<Permit> {
        room.enter().now_or_never()
    }

    #[test]
    fn it_grows_and_shrinks_while_it_is_taken_and_no_permit_is_lost() {
        let room = Room::new(2);
        let mut taken = vec![entered(&room).unwrap(), entered(&room).unwrap()];
        assert!(entered(&room).is_none());
        room.resize(4);
        taken.extend([entered(&room).unwrap(), entered(&room).unwrap()]);
        assert!(entered(&room).is_none());
        // Three have to go before there is room for one.
        room.resize(2);
        for _ in 0..2 {
            taken.pop();
            assert!(entered(&room).is_none());
        }
        taken.pop();
        drop(entered(&room).unwrap());
        // As before, although it shrank and grew while it was taken.
        room.resize(1);
        room.resize(4);
        taken.clear();
        let all: Vec<_> = std::iter::from_fn(|| entered(&room)).collect();
        assert_eq!(all.len(), 4);
    }

    #[test]
    fn who_waits_is_let_in_when_it_grows() {
        let room = Room::new(0);
        let mut waiting = std::pin::pin!(room.enter());
        assert!(waiting.as_mut().now_or_never().is_none());
        room.resize(1);
        assert!(waiting.now_or_never().is_some());
    }

    #[test]
    fn one_may_be_admitted_beyond_the_limit_and_leaves_nothing_behind() {
        let room = Room::new(0);
        room.admit_one();
        assert_eq!(room.free(), 1);
        drop(entered(&room).unwrap());
        assert!(entered(&room).is_none());
    }
}
