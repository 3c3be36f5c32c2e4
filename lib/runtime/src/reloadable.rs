//! Settings that may change while the process runs.

use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::watch;

/// A subscription to the current settings. While a service runs, it applies changes of its
/// reloadable settings, and keeps the initial values of all others.
pub struct Reloadable<C> {
    read: Arc<dyn Fn() -> C + Send + Sync>,
    changes: watch::Receiver<()>,
}

/// Publishes new settings to all subscribers.
pub struct ReloadHandle<C> {
    current: Arc<RwLock<C>>,
    changes: watch::Sender<()>,
}

impl<C: Clone + Send + Sync + 'static> Reloadable<C> {
    /// Settings that never change.
    #[must_use]
    pub fn fixed(config: C) -> Self {
        Self::with_handle(config).1
    }

    /// Settings that change when the [`ReloadHandle`] publishes new ones.
    #[must_use]
    pub fn with_handle(config: C) -> (ReloadHandle<C>, Self) {
        let current = Arc::new(RwLock::new(config));
        let (sender, receiver) = watch::channel(());
        let shared = Arc::clone(&current);
        let read = move || shared.read().clone();
        let handle = ReloadHandle { current, changes: sender };
        (handle, Self { read: Arc::new(read), changes: receiver })
    }
}

impl<C: 'static> Reloadable<C> {
    /// Returns the current settings.
    #[must_use]
    pub fn current(&self) -> C {
        (self.read)()
    }

    /// Derives settings, such as those of one role, that change whenever these settings change.
    #[must_use]
    pub fn map<P>(&self, derive: impl Fn(C) -> P + Send + Sync + 'static) -> Reloadable<P> {
        let read = Arc::clone(&self.read);
        Reloadable { read: Arc::new(move || derive(read())), changes: self.changes.clone() }
    }

    /// Waits for the next change, possibly for ever, and returns the new settings. They may equal
    /// the old ones, because the change may concern a setting that [`map`](Self::map) left out.
    /// Cancel-safe: dropping the future misses no change.
    pub async fn changed(&mut self) -> C {
        if self.changes.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.current()
    }
}

impl<C> Clone for Reloadable<C> {
    fn clone(&self) -> Self {
        Self { read: Arc::clone(&self.read), changes: self.changes.clone() }
    }
}

impl<C> ReloadHandle<C> {
    /// Publishes the new settings to all subscribers.
    pub fn set(&self, config: C) {
        *self.current.write() = config;
        self.changes.send_replace(());
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn derived_settings_change_with_their_source() {
        let (handle, source) = Reloadable::with_handle((1, "a"));
        let mut derived = source.map(|(number, _)| number * 10);
        assert_eq!(derived.current(), 10);
        assert_eq!(derived.changed().now_or_never(), None);
        handle.set((2, "b"));
        handle.set((3, "c"));
        assert_eq!((source.current(), derived.current()), ((3, "c"), 30));
        assert_eq!(derived.changed().now_or_never(), Some(30));
        assert_eq!(derived.changed().now_or_never(), None);
    }

    #[tokio::test]
    async fn fixed_settings_never_change() {
        assert_eq!(Reloadable::fixed(1).changed().now_or_never(), None);
    }
}
