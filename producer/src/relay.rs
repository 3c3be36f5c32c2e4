//! The outage spool and its relay: what the broker does not take waits on this disk, and goes to the
//! broker, the oldest first, as soon as that takes messages again.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::bail;
use broker::{LinkStatus, OpenError, PublishError, Publisher, Spool, SpoolError, Spooled};
use futures_util::future::join_all;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

// Decision: docs/decisions/0007-does-the-producer-run-without-a-spool.md
/// How soon a spool that cannot be opened is tried again.
const OPEN_INTERVAL: Duration = Duration::from_secs(5);
/// How soon the relay looks into an empty spool although nothing was reported as added: a message can be
/// committed after its callback has given up.
const RELAY_INTERVAL: Duration = Duration::from_secs(1);
/// Messages that are relayed at once, at most. A broker that is slow to confirm takes as many per
/// second only if many are under way.
const RELAYED_AT_ONCE: usize = 2_048;
const MEASURE_INTERVAL: Duration = Duration::from_secs(1);
/// Longer than a callback may wait: nobody waits for this, and what is not confirmed goes out twice.
const RELAY_TIMEOUT: Duration = Duration::from_secs(5);

/// Which file it is, and when it was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let file = std::fs::metadata(path).ok()?;
        let modified = (file.mtime(), file.mtime_nsec());
        Some(Self { device: file.dev(), inode: file.ino(), bytes: file.len(), modified })
    }
}

/// Both ends of the spool, and what is known of the broker meanwhile.
pub(crate) struct Outage {
    path: PathBuf,
    max_bytes: u64,
    /// `None` while it cannot be opened.
    spool: watch::Sender<Option<Arc<Spool>>>,
    status: watch::Sender<LinkStatus>,
    kept: watch::Sender<LinkStatus>,
    /// The file that was refused for what it is: it is not tried again as long as it is the same.
    refused: Mutex<Option<Stamp>>,
    /// What callbacks give the broker.
    publish_timeout: Duration,
    // Decision: docs/decisions/0006-how-does-the-producer-know-that-the-broker-accepts.md
    /// Whether they are to ask it first. Who is not confirmed in time clears it; whatever is confirmed in
    /// time sets it, be it relayed or published past a spool that does not take it. So it cannot
    /// stay cleared: with the next callback one of the two is tried.
    broker_takes: AtomicBool,
    /// Wakes the relay.
    news: Notify,
    publisher: Publisher,
}

impl Outage {
    /// Opens the spool; if that fails, callbacks do without it until it can be opened.
    pub(crate) async fn begin(
        path: PathBuf,
        max_bytes: u64,
        publish_timeout: Duration,
        publisher: Publisher,
    ) -> Self {
        describe_metrics();
        let outage = Self {
            path,
            max_bytes,
            spool: watch::Sender::new(None),
            status: watch::Sender::new(Err("not opened yet".to_owned())),
            kept: watch::Sender::new(Ok(())),
            refused: Mutex::new(None),
            publish_timeout,
            broker_takes: AtomicBool::new(true),
            news: Notify::new(),
            publisher,
        };
        outage.open().await;
        outage
    }

    /// The spool, if it could be opened.
    pub(crate) fn spool(&self) -> Option<Arc<Spool>> {
        self.spool.borrow().clone()
    }

    /// Returns as soon as the spool could be opened.
    pub(crate) async fn opened(&self) {
        // Its sender is here.
        let _ = self.spool.subscribe().wait_for(Option::is_some).await;
    }

    /// Whether it takes messages: `Ok`, or why not.
    pub(crate) fn status(&self) -> watch::Receiver<LinkStatus> {
        self.status.subscribe()
    }

    /// See [`Spool::kept`].
    pub(crate) fn kept(&self) -> watch::Receiver<LinkStatus> {
        self.kept.subscribe()
    }

    /// Whether the broker takes what is relayed: `Ok`, or why not.
    pub(crate) fn relay_status(&self) -> watch::Receiver<LinkStatus> {
        self.publisher.status()
    }

    pub(crate) fn broker_takes(&self) -> bool {
        self.broker_takes.load(Ordering::Relaxed)
    }

    /// Says whether the broker has confirmed something in time: if not, callbacks go to the spool at
    /// once from now on.
    pub(crate) fn set_broker_takes(&self, takes: bool) {
        self.broker_takes.store(takes, Ordering::Relaxed);
    }

    /// Records what became of `count` messages that were to be added to `spool`.
    pub(crate) fn note(&self, spool: &Spool, added: &Result<(), SpoolError>, count: usize) {
        if added.is_ok() {
            metrics::counter!("lastseen_spooled_total").increment(count as u64);
            self.news.notify_one();
        } else {
            // Before the callback is answered.
            self.set_status(spool.status().borrow().clone());
        }
    }

    /// Relays for as long as this is polled. When it is dropped, nothing is lost, and something may
    /// be published again at the next start. A spool that turns out to be damaged, or whose file is gone, is
    /// replaced.
    ///
    /// # Errors
    /// When the relay's publisher has died.
    pub(crate) async fn relay(&self) -> anyhow::Result<()> {
        let mut waits = broker::backoff();
        loop {
            let Some(spool) = self.spool() else {
                sleep(OPEN_INTERVAL).await;
                self.open().await;
                continue;
            };
            let begun = Instant::now();
            tokio::select! {
                () = self.relay_all(&spool) => {}
                () = measure(&spool) => {}
                () = follow(spool.status(), &self.status) => {}
                () = follow(spool.kept(), &self.kept) => {}
                () = spool.died() => {}
                () = self.publisher.died() => bail!("the relay's publisher has died"),
            }
            // Only its end gets here.
            self.set_status(spool.status().borrow().clone());
            let _ = self.spool.send_replace(None);
            drop(spool);
            if begun.elapsed() > OPEN_INTERVAL {
                waits = broker::backoff();
            }
            sleep(waits.next().unwrap_or(OPEN_INTERVAL)).await;
            self.open().await;
        }
    }

    pub(crate) async fn close(self) {
        let spool = self.spool.send_replace(None);
        if let Some(spool) = spool.and_then(Arc::into_inner) {
            match spool.count().await {
                Ok(0) => {}
                Ok(messages) => {
                    tracing::warn!(
                        messages,
                        "the spool is not empty; they go out after the next start"
                    );
                }
                Err(error) => tracing::warn!(%error, "cannot look into the spool"),
            }
            spool.close().await;
        }
        self.publisher.close().await;
    }

    async fn open(&self) {
        let (path, max_bytes) = (self.path.clone(), self.max_bytes);
        let refused = *self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let opened = tokio::task::spawn_blocking(move || {
            let stamp = Stamp::of(&path);
            if refused.is_some() && refused == stamp {
                return None;
            }
            Some((Spool::open(&path, max_bytes), stamp))
        });
        let reason = match opened.await {
            Ok(None) => return,
            Ok(Some((Ok(spool), _))) => {
                let found = spool.count().await.unwrap_or_default();
                if found > 0 {
                    tracing::warn!(messages = found, "an earlier outage's spool; relaying it");
                }
                self.set_refused(None);
                self.set_status(spool.status().borrow().clone());
                let _ = self.spool.send_replace(Some(Arc::new(spool)));
                return;
            }
            Ok(Some((Err(error), stamp))) => {
                let is_unusable =
                    matches!(error, OpenError::Foreign { .. } | OpenError::Damaged { .. });
                self.set_refused(stamp.filter(|_| is_unusable));
                error.to_string()
            }
            Err(died) => died.to_string(),
        };
        if self.status.borrow().as_ref().is_err_and(|known| *known == reason) {
            return;
        }
        tracing::error!(reason, "no spool: while the broker is away, callbacks will be refused");
        self.set_status(Err(reason));
    }

    fn set_refused(&self, stamp: Option<Stamp>) {
        *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = stamp;
    }

    fn set_status(&self, status: LinkStatus) {
        self.status.send_if_modified(|now| {
            let modified = *now != status;
            *now = status;
            modified
        });
    }

    async fn relay_all(&self, spool: &Spool) {
        let mut waits = broker::backoff();
        // The first is a probe.
        let mut limit = 1;
        // Since the spool was last empty.
        let mut relayed = 0;
        loop {
            let messages = match spool.oldest(limit).await {
                Ok(messages) => messages,
                Err(error) => {
                    tracing::debug!(%error, "cannot read the spool");
                    sleep(waits.next().unwrap_or(OPEN_INTERVAL)).await;
                    continue;
                }
            };
            if messages.is_empty() {
                if relayed > 0 {
                    tracing::info!(relayed, "the spool is empty again");
                    relayed = 0;
                }
                // Neither case is an error: added, or time to look.
                let _ = timeout(RELAY_INTERVAL, self.news.notified()).await;
                continue;
            }
            // If the publisher has died, this process ends.
            self.publisher.opened().await;
            let started = Instant::now();
            let confirmed = self.publish(&messages).await;
            let took = started.elapsed();
            let takes_all = confirmed.len() == messages.len();
            // A broker that is slow gets everything from here, and nothing twice.
            let in_time = takes_all && took < self.publish_timeout;
            self.set_broker_takes(in_time);
            if !confirmed.is_empty() {
                relayed += confirmed.len();
                self.remove(spool, confirmed).await;
            }
            if takes_all {
                waits = broker::backoff();
                limit = (4 * limit).min(RELAYED_AT_ONCE);
                if in_time {
                    // Half of the time belongs to the callbacks of now.
                    sleep(took).await;
                }
            } else {
                limit = 1;
                sleep(waits.next().unwrap_or(OPEN_INTERVAL)).await;
            }
        }
    }

    /// Publishes `messages`, those of one callback together, and gives the numbers of those confirmed.
    async fn publish(&self, messages: &[Spooled]) -> Vec<i64> {
        let callbacks = messages.chunk_by(|one, next| one.origin() == next.origin());
        let published = callbacks.map(async |messages| {
            let origin = messages[0].origin();
            let ids: Vec<i64> = messages.iter().map(|message| message.id).collect();
            let refused = match self.publisher.publish_ids(origin, &ids, RELAY_TIMEOUT).await {
                Ok(()) => Vec::new(),
                Err(PublishError::Refused { which }) => which,
                Err(error) => {
                    let callback_id = origin.callback_id;
                    tracing::debug!(%error, callback_id, "not relayed; trying again");
                    return Vec::new();
                }
            };
            let confirmed = messages.iter().enumerate().filter(|(at, _)| !refused.contains(at));
            confirmed.map(|(_, message)| message.number).collect()
        });
        join_all(published).await.concat()
    }

    /// They are confirmed: if they stayed, they would go out again.
    async fn remove(&self, spool: &Spool, confirmed: Vec<i64>) {
        let count = confirmed.len();
        for wait in broker::backoff() {
            match spool.remove(confirmed.clone()).await {
                Ok(()) => break,
                Err(error) => tracing::debug!(%error, "not removed from the spool; trying again"),
            }
            sleep(wait).await;
        }
        metrics::counter!("lastseen_relayed_total").increment(count as u64);
    }
}

/// Passes on each change of a status; returns when there will be no more.
async fn follow(mut from: watch::Receiver<LinkStatus>, to: &watch::Sender<LinkStatus>) {
    loop {
        let status = from.borrow_and_update().clone();
        to.send_if_modified(|now| {
            let modified = *now != status;
            *now = status;
            modified
        });
        if from.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps the gauges true.
async fn measure(spool: &Spool) {
    let gauge = metrics::gauge!("lastseen_spool_messages");
    let oldest_age = metrics::gauge!("lastseen_spool_oldest_age_seconds");
    let mut ticks = tokio::time::interval(MEASURE_INTERVAL);
    loop {
        ticks.tick().await;
        if let Ok(messages) = spool.count().await {
            #[expect(clippy::cast_precision_loss, reason = "nobody counts beyond 2^52 messages")]
            gauge.set(messages as f64);
        }
        if let Ok(oldest) = spool.oldest_at().await {
            let age = oldest.and_then(|since| since.elapsed().ok()).unwrap_or_default();
            oldest_age.set(age.as_secs_f64());
        }
    }
}

fn describe_metrics() {
    metrics::describe_counter!("lastseen_spooled_total", "Messages that went to the spool.");
    metrics::describe_counter!("lastseen_relayed_total", "Messages relayed to the broker.");
    metrics::describe_gauge!("lastseen_spool_messages", "Messages that wait in the spool.");
    metrics::describe_gauge!(
        "lastseen_spool_oldest_age_seconds",
        metrics::Unit::Seconds,
        "How long the oldest message in the spool has waited; 0 if there is none."
    );
    // There from the start on, so that their growth can be told from the first one on.
    metrics::counter!("lastseen_spooled_total").increment(0);
    metrics::counter!("lastseen_relayed_total").increment(0);
}
