//! Settings that may change while the process runs.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::watch;

/// What the settings are now, and word of when they change. Which of them a service heeds while it runs
/// is its own business; the others are those of its start.
pub struct Live<C> {
    now: Arc<dyn Fn() -> C + Send + Sync>,
    changes: watch::Receiver<()>,
}

/// Changes the settings for all that have them.
pub struct Changer<C> {
    now: Arc<RwLock<C>>,
    changes: watch::Sender<()>,
}

impl<C: Clone + Send + Sync + 'static> Live<C> {
    /// Settings that stay as they are.
    #[must_use]
    pub fn fixed(config: C) -> Self {
        Self::changeable(config).1
    }

    /// Settings that whoever has the [`Changer`] can change.
    #[must_use]
    pub fn changeable(config: C) -> (Changer<C>, Self) {
        let now = Arc::new(RwLock::new(config));
        let (changes, heard) = watch::channel(());
        let read = Arc::clone(&now);
        let read = move || read.read().unwrap_or_else(PoisonError::into_inner).clone();
        (Changer { now, changes }, Self { now: Arc::new(read), changes: heard })
    }
}

impl<C: 'static> Live<C> {
    /// What they are now.
    #[must_use]
    pub fn now(&self) -> C {
        (self.now)()
    }

    /// A part of them, or what is made of them.
    #[must_use]
    pub fn part<P>(&self, part: impl Fn(C) -> P + Send + Sync + 'static) -> Live<P> {
        let whole = Arc::clone(&self.now);
        Live { now: Arc::new(move || part(whole())), changes: self.changes.clone() }
    }

    /// Waits for the next change, maybe for ever, and says what they are then. They may be the same: what
    /// has changed may be another part of them. Nothing is missed when this is dropped.
    pub async fn changed(&mut self) -> C {
        if self.changes.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.now()
    }
}

impl<C> Clone for Live<C> {
    fn clone(&self) -> Self {
        Self { now: Arc::clone(&self.now), changes: self.changes.clone() }
    }
}

impl<C> Changer<C> {
    /// From now on they are these.
    pub fn set(&self, config: C) {
        *self.now.write().unwrap_or_else(PoisonError::into_inner) = config;
        self.changes.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn a_part_changes_with_the_whole_and_nothing_is_missed() {
        let (changer, whole) = Live::changeable((1, "a"));
        let mut part = whole.part(|(number, _)| number * 10);
        assert_eq!(part.now(), 10);
        assert_eq!(part.changed().now_or_never(), None);
        changer.set((2, "b"));
        changer.set((3, "c"));
        assert_eq!((whole.now(), part.now()), ((3, "c"), 30));
        assert_eq!(part.changed().now_or_never(), Some(30));
        assert_eq!(part.changed().now_or_never(), None);
    }

    #[tokio::test]
    async fn what_is_fixed_never_changes() {
        assert_eq!(Live::fixed(1).changed().now_or_never(), None);
    }
}
