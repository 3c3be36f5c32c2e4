//! A FIFO semaphore whose limit can change at run time, while permits are held.
//!
//! Decision: docs/decisions/0025-how-does-max-consumers-change-at-run-time.md

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Semaphore;

pub(crate) struct ResizableSemaphore {
    available: Semaphore,
    size: Mutex<Size>,
}

struct Size {
    limit: usize,
    /// The number of permits, available or held. After the limit has fallen, this number exceeds it
    /// until enough held permits are released.
    permits: usize,
}

/// Released when dropped.
pub(crate) struct Permit(Arc<ResizableSemaphore>);

impl ResizableSemaphore {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        let size = Mutex::new(Size { limit, permits: limit });
        Arc::new(Self { available: Semaphore::new(limit), size })
    }

    pub(crate) async fn acquire(self: &Arc<Self>) -> Permit {
        // The semaphore is never closed. If it were, the only effect would be that nothing is
        // limited.
        if let Ok(permit) = self.available.acquire().await {
            permit.forget();
        }
        Permit(Arc::clone(self))
    }

    /// Changes the limit. Held permits stay valid, and so does a permit that was just assigned to a
    /// waiter.
    pub(crate) fn resize(&self, limit: usize) {
        let mut size = self.size.lock();
        size.limit = limit;
        let surplus = size.permits.saturating_sub(limit);
        size.permits -= self.available.forget_permits(surplus);
        self.fill(&mut size);
    }

    /// Adds one permit, regardless of the limit. The permit disappears when it is released.
    pub(crate) fn add_excess_permit(&self) {
        self.size.lock().permits += 1;
        self.available.add_permits(1);
    }

    pub(crate) fn available(&self) -> usize {
        self.available.available_permits()
    }

    fn fill(&self, size: &mut Size) {
        let missing = size.limit.saturating_sub(size.permits);
        size.permits += missing;
        self.available.add_permits(missing);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut size = self.0.size.lock();
        size.permits -= 1;
        self.0.fill(&mut size);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn try_acquire(semaphore: &Arc<ResizableSemaphore>) -> Option<Permit> {
        semaphore.acquire().now_or_never()
    }

    #[test]
    fn resizing_while_permits_are_held_loses_no_permit() {
        let semaphore = ResizableSemaphore::new(2);
        let mut held = vec![try_acquire(&semaphore).unwrap(), try_acquire(&semaphore).unwrap()];
        assert!(try_acquire(&semaphore).is_none());
        semaphore.resize(4);
        held.extend([try_acquire(&semaphore).unwrap(), try_acquire(&semaphore).unwrap()]);
        assert!(try_acquire(&semaphore).is_none());
        // Three of the four must be released before one is available.
        semaphore.resize(2);
        for _ in 0..2 {
            held.pop();
            assert!(try_acquire(&semaphore).is_none());
        }
        held.pop();
        drop(try_acquire(&semaphore).unwrap());
        // The limit falls and rises while a permit is held. The number of permits stays correct.
        semaphore.resize(1);
        semaphore.resize(4);
        held.clear();
        let all: Vec<_> = std::iter::from_fn(|| try_acquire(&semaphore)).collect();
        assert_eq!(all.len(), 4);
    }

    #[test]
    fn a_waiter_gets_a_permit_when_the_limit_grows() {
        let semaphore = ResizableSemaphore::new(0);
        let mut waiter = std::pin::pin!(semaphore.acquire());
        assert!(waiter.as_mut().now_or_never().is_none());
        semaphore.resize(1);
        assert!(waiter.now_or_never().is_some());
    }

    #[test]
    fn an_excess_permit_can_be_acquired_once() {
        let semaphore = ResizableSemaphore::new(0);
        semaphore.add_excess_permit();
        assert_eq!(semaphore.available(), 1);
        drop(try_acquire(&semaphore).unwrap());
        assert!(try_acquire(&semaphore).is_none());
    }
}
