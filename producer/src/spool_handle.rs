//! Opens the producer's spool, reopens it after a failure, and reports its status and metrics.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use messaging::queue::{OpenError, Origin, Spool, SpoolError};
use parking_lot::Mutex;
use runtime::Status;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

const MEASURE_INTERVAL: Duration = Duration::from_secs(1);
/// How often [`SpoolHandle::wait_until_empty`] checks the spool.
const EMPTY_CHECK_INTERVAL: Duration = Duration::from_millis(100);

// Decision: docs/decisions/0007-does-the-producer-run-without-a-spool.md
/// The spool, which may be missing: callbacks do without a spool while it cannot be opened.
pub(crate) struct SpoolHandle {
    path: PathBuf,
    max_bytes: u64,
    /// `None` while the spool cannot be opened.
    spool: watch::Sender<Option<Arc<Spool>>>,
    status: watch::Sender<Status>,
    integrity: watch::Sender<Status>,
    /// A file that is damaged or not a spool. The producer does not open it again until it changes.
    unusable_file: Mutex<Option<FileVersion>>,
    message_added: Notify,
}

/// Identifies a file and its last change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileVersion {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl FileVersion {
    fn of(path: &Path) -> Option<Self> {
        let file = std::fs::metadata(path).ok()?;
        let modified = (file.mtime(), file.mtime_nsec());
        Some(Self { device: file.dev(), inode: file.ino(), bytes: file.len(), modified })
    }
}

impl SpoolHandle {
    /// Opens the spool. If that fails, callbacks do without it until [`SpoolHandle::reopen`]
    /// succeeds.
    pub(crate) async fn open(path: PathBuf, max_bytes: u64) -> Self {
        describe_metrics();
        let handle = Self {
            path,
            max_bytes,
            spool: watch::Sender::new(None),
            status: watch::Sender::new(Err("not opened yet".to_owned())),
            integrity: watch::Sender::new(Ok(())),
            unusable_file: Mutex::new(None),
            message_added: Notify::new(),
        };
        handle.reopen().await;
        handle
    }

    /// The spool, or `None` while it cannot be opened.
    pub(crate) fn get(&self) -> Option<Arc<Spool>> {
        self.spool.borrow().clone()
    }

    pub(crate) async fn wait_until_open(&self) {
        // This cannot fail, because the sender lives as long as `self`.
        let _ = self.spool.subscribe().wait_for(Option::is_some).await;
    }

    /// `Ok` while the spool stores messages, otherwise the reason why it does not.
    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// See [`Spool::kept`].
    pub(crate) fn integrity(&self) -> watch::Receiver<Status> {
        self.integrity.subscribe()
    }

    /// Adds a message for each of `ids` to `spool`, and wakes the relay.
    ///
    /// # Errors
    /// [`SpoolError`], at the latest after `within`.
    pub(crate) async fn add(
        &self,
        spool: &Spool,
        origin: Origin<'_>,
        ids: &[i64],
        within: Duration,
    ) -> Result<(), SpoolError> {
        let added = spool.add(origin, ids, within).await;
        if added.is_ok() {
            metrics::counter!("lastseen_spooled_total").increment(ids.len() as u64);
            self.message_added.notify_one();
        } else {
            // `/readyz` must report the reason before the callback is answered.
            set_if_changed(&self.status, spool.status().borrow().clone());
        }
        added
    }

    /// Returns when a message is added, or after `at_most`.
    pub(crate) async fn message_added(&self, at_most: Duration) {
        let _ = timeout(at_most, self.message_added.notified()).await;
    }

    /// Tries to open the spool, and reports a failure once for each reason.
    pub(crate) async fn reopen(&self) {
        let (path, max_bytes) = (self.path.clone(), self.max_bytes);
        let unusable = *self.unusable_file.lock();
        let opened = tokio::task::spawn_blocking(move || {
            let version = FileVersion::of(&path);
            if unusable.is_some() && unusable == version {
                return None;
            }
            Some((Spool::open(&path, max_bytes), version))
        });
        let reason = match opened.await {
            Ok(None) => return,
            Ok(Some((Ok(spool), _))) => {
                let messages = spool.count().await.unwrap_or_default();
                if messages > 0 {
                    tracing::warn!(
                        messages,
                        "the spool holds messages from an earlier outage; relaying them"
                    );
                }
                *self.unusable_file.lock() = None;
                set_if_changed(&self.status, spool.status().borrow().clone());
                let _ = self.spool.send_replace(Some(Arc::new(spool)));
                return;
            }
            Ok(Some((Err(error), version))) => {
                let is_unusable =
                    matches!(error, OpenError::Foreign { .. } | OpenError::Damaged { .. });
                *self.unusable_file.lock() = version.filter(|_| is_unusable);
                error.to_string()
            }
            Err(panicked) => panicked.to_string(),
        };
        if self.status.borrow().as_ref().is_err_and(|known| *known == reason) {
            return;
        }
        tracing::error!(
            reason,
            "cannot open the spool; until it opens, callbacks are refused while the broker is away"
        );
        set_if_changed(&self.status, Err(reason));
    }

    /// Keeps status and gauges up to date until `spool` stops working.
    pub(crate) async fn monitor(&self, spool: &Spool) {
        tokio::select! {
            () = measure(spool) => {}
            () = forward(spool.status(), &self.status) => {}
            () = forward(spool.kept(), &self.integrity) => {}
            () = spool.ended() => {}
        }
    }

    /// Drops a spool that has stopped working, so that it can be opened again.
    pub(crate) fn discard(&self, spool: Arc<Spool>) {
        set_if_changed(&self.status, spool.status().borrow().clone());
        let _ = self.spool.send_replace(None);
        drop(spool);
    }

    /// Returns when the spool is open and empty.
    pub(crate) async fn wait_until_empty(&self) {
        if self.is_empty().await {
            return;
        }
        tracing::info!("no longer accepting callbacks; the producer ends when its spool is empty");
        let mut ticks = tokio::time::interval(EMPTY_CHECK_INTERVAL);
        while !self.is_empty().await {
            ticks.tick().await;
        }
    }

    async fn is_empty(&self) -> bool {
        // A spool that cannot be opened may hold messages.
        let Some(spool) = self.get() else { return false };
        matches!(spool.count().await, Ok(0))
    }

    /// Closes the spool. Its messages stay for the next start.
    pub(crate) async fn close(self) {
        let Some(spool) = self.spool.send_replace(None).and_then(Arc::into_inner) else { return };
        match spool.count().await {
            Ok(0) => {}
            Ok(messages) => tracing::warn!(
                messages,
                "the spool still holds messages; they are relayed after the next start"
            ),
            Err(error) => tracing::warn!(%error, "cannot count the messages in the spool"),
        }
        spool.close().await;
    }
}

/// Forwards each change of a status; returns when the sender of `from` is dropped.
async fn forward(mut from: watch::Receiver<Status>, to: &watch::Sender<Status>) {
    loop {
        let status = from.borrow_and_update().clone();
        set_if_changed(to, status);
        if from.changed().await.is_err() {
            return;
        }
    }
}

fn set_if_changed(current: &watch::Sender<Status>, status: Status) {
    current.send_if_modified(|current| {
        let is_changed = *current != status;
        *current = status;
        is_changed
    });
}

async fn measure(spool: &Spool) {
    let gauge = metrics::gauge!("lastseen_spool_messages");
    let oldest_age = metrics::gauge!("lastseen_spool_oldest_age_seconds");
    let mut ticks = tokio::time::interval(MEASURE_INTERVAL);
    loop {
        ticks.tick().await;
        if let Ok(messages) = spool.count().await {
            #[expect(clippy::cast_precision_loss, reason = "a spool never holds 2^52 messages")]
            gauge.set(messages as f64);
        }
        if let Ok(oldest) = spool.oldest_at().await {
            let age = oldest.and_then(|since| since.elapsed().ok()).unwrap_or_default();
            oldest_age.set(age.as_secs_f64());
        }
    }
}

fn describe_metrics() {
    metrics::describe_counter!("lastseen_spooled_total", "Messages added to the spool.");
    metrics::describe_gauge!("lastseen_spool_messages", "Messages that wait in the spool.");
    metrics::describe_gauge!(
        "lastseen_spool_oldest_age_seconds",
        metrics::Unit::Seconds,
        "Age of the oldest message in the spool; 0 if the spool is empty."
    );
    // Registered at the start, so that the first increment counts as growth.
    metrics::counter!("lastseen_spooled_total").increment(0);
}
