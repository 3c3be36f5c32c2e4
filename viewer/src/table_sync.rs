//! Keeps the view up to date: by events, and by reading the table.
//!
//! Decision: docs/decisions/0050-how-does-the-viewer-order-events.md

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use events::{Notification, Subscriber};
use service::DependencyStatus;
use store::{Objects, StoreError};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::view_state::{Sighted, ViewState, micros_of};

/// Rows read at a time.
const PAGE: u32 = 10_000;
/// Rows applied before everything else that runs has its turn.
const ROWS_AT_ONCE: usize = 1_000;
/// How often the table is read while events announce its changes: nothing else shows the loss of the latest
/// event.
const INTERVAL_MAX: Duration = Duration::from_mins(1);
/// How often it is read while no events come, or while something else changes it without events, such as
/// the Go services.
const INTERVAL_MIN: Duration = Duration::from_secs(2);
/// Events announce the changes if a reading finds at most one in this many without its event. The events of those may
/// still be on their way.
const UNANNOUNCED_SHARE: usize = 10;
/// The least pause between two readings,
const PAUSE: Duration = Duration::from_secs(1);
/// which is also this many times as long as a reading takes.
const PAUSE_FACTOR: u32 = 10;

/// Receives events, and reads the table where they may be missing.
pub(crate) struct TableSync {
    pub(crate) view: Arc<ViewState>,
    pub(crate) store: store::Config,
    pub(crate) table: watch::Sender<DependencyStatus>,
    /// Whether the table was read once; then there is something to show, whatever happens to the table.
    pub(crate) first_reading: watch::Sender<DependencyStatus>,
}

impl TableSync {
    /// Ends only with its task.
    pub(crate) async fn run(self, mut subscriber: Subscriber) {
        let events = subscriber.status();
        let missed = Notify::new();
        let announced = Announced::default();
        let receive = async {
            loop {
                match subscriber.next().await {
                    Notification::Committed(kind, objects) => {
                        let sighted = |object: &events::Object| Sighted {
                            id: object.id,
                            last_seen: micros_of(object.last_seen),
                        };
                        let changed = self.view.apply(kind, objects.iter().map(sighted));
                        announced.add(kind, changed);
                    }
                    Notification::Missed(why) => {
                        tracing::debug!(why, "events may be missing: reading the table");
                        metrics::counter!("lastseen_viewer_events_missed_total").increment(1);
                        missed.notify_one();
                    }
                }
            }
        };
        tokio::join!(receive, self.keep_reading(events, &missed, &announced));
    }

    async fn keep_reading(
        &self,
        mut events: watch::Receiver<DependencyStatus>,
        missed: &Notify,
        announced: &Announced,
    ) {
        let mut waits = amqp::backoff();
        let mut coverage = EventCoverage::default();
        let mut interval = INTERVAL_MIN;
        loop {
            let began = Instant::now();
            let reason = match self.read().await {
                Ok(unannounced) => {
                    coverage.update(announced.take(), unannounced);
                    interval = coverage.next_interval(interval);
                    metrics::counter!("lastseen_viewer_readings_total", "outcome" => "ok")
                        .increment(1);
                    waits = amqp::backoff();
                    let before = self.table.send_replace(Ok(()));
                    if before.is_err() {
                        tracing::info!(objects = self.view.len(), "table read");
                    }
                    _ = self.first_reading.send_replace(Ok(()));
                    sleep(PAUSE.max(began.elapsed() * PAUSE_FACTOR)).await;
                    self.wait(interval, &mut events, missed).await;
                    continue;
                }
                Err(error) => error.to_string(),
            };
            metrics::counter!("lastseen_viewer_readings_total", "outcome" => "failed").increment(1);
            if self.first_reading.borrow().is_err() {
                _ = self.first_reading.send_replace(Err(reason.clone()));
            }
            let before = self.table.send_replace(Err(reason.clone()));
            if before.is_ok() {
                tracing::warn!(
                    reason,
                    "table cannot be read: showing the last known objects, and retrying"
                );
            } else {
                tracing::debug!(reason, "table still cannot be read");
            }
            sleep(waits.next().unwrap_or(PAUSE)).await;
        }
    }

    /// Until there is a reason to read the table again.
    async fn wait(
        &self,
        interval: Duration,
        events: &mut watch::Receiver<DependencyStatus>,
        missed: &Notify,
    ) {
        let since = Instant::now();
        loop {
            let are_received = events.borrow_and_update().is_ok();
            let interval = if are_received { interval } else { INTERVAL_MIN };
            let rest = interval.saturating_sub(since.elapsed());
            tokio::select! {
                () = missed.notified() => return,
                () = sleep(rest) => return,
                changed = events.changed() => if changed.is_err() {
                    // The subscriber was dropped, and this task ends with it.
                    std::future::pending::<()>().await;
                },
            }
        }
    }

    /// Reads the whole table. What is committed meanwhile may be read or not; it is an event in any case.
    /// Returns the changes that no event had announced.
    ///
    /// Each reading has a connection of its own: after a failover, one that was kept could lead to the
    /// former primary, which answers for as long as it runs.
    async fn read(&self) -> Result<Changes, StoreError> {
        let mut reader = Objects::open(&self.store).await?;
        self.view.begin_reading();
        let mut after = None;
        let mut unannounced = Changes::default();
        loop {
            let page = reader.page(after, PAGE).await?;
            let is_past = |object: &&store::Object| !object.age.is_zero();
            let clock = page.iter().find(is_past);
            if let Some(now) = clock.and_then(|object| object.last_seen.checked_add(object.age)) {
                self.view.set_clock(now);
            }
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            let sighted = |object: &store::Object| Sighted {
                id: object.id,
                last_seen: micros_of(object.last_seen),
            };
            for rows in page.chunks(ROWS_AT_ONCE) {
                unannounced.seen += self.view.apply(events::Kind::Seen, rows.iter().map(sighted));
                tokio::task::yield_now().await;
            }
        }
        unannounced.gone += self.view.end_reading().await;
        Ok(unannounced)
    }
}

/// Numbers of objects that have changed.
#[derive(Clone, Copy, Default)]
struct Changes {
    seen: usize,
    gone: usize,
}

/// The changes that events have announced since the last reading.
#[derive(Default)]
struct Announced {
    seen: AtomicUsize,
    gone: AtomicUsize,
}

impl Announced {
    fn add(&self, kind: events::Kind, changed: usize) {
        let count = match kind {
            events::Kind::Online | events::Kind::Seen => &self.seen,
            events::Kind::Gone => &self.gone,
        };
        count.fetch_add(changed, Ordering::Relaxed);
    }

    fn take(&self) -> Changes {
        Changes {
            seen: self.seen.swap(0, Ordering::Relaxed),
            gone: self.gone.swap(0, Ordering::Relaxed),
        }
    }
}

/// Which kinds of changes events announce, as far as readings have shown. A system without changes of one kind has
/// shown nothing: another service may be the one that makes them, and does so without events.
#[derive(Default)]
struct EventCoverage {
    seen: bool,
    gone: bool,
}

impl EventCoverage {
    /// Takes the changes since the last reading into account.
    fn update(&mut self, announced: Changes, unannounced: Changes) {
        let judge = |is_covered: bool, announced: usize, unannounced: usize| {
            let changes = announced.saturating_add(unannounced);
            let is_missing = unannounced.saturating_mul(UNANNOUNCED_SHARE) > changes;
            !is_missing && (is_covered || announced > 0)
        };
        self.seen = judge(self.seen, announced.seen, unannounced.seen);
        self.gone = judge(self.gone, announced.gone, unannounced.gone);
    }

    /// When to read the table again, if the last interval was `interval`.
    fn next_interval(&self, interval: Duration) -> Duration {
        if self.seen && self.gone {
            interval.saturating_mul(2).min(INTERVAL_MAX)
        } else {
            INTERVAL_MIN
        }
    }
}

/// Returns true as soon as the status is, and false after a while.
pub(crate) async fn is_true(status: &mut watch::Receiver<bool>, within: Duration) -> bool {
    timeout(within, status.wait_for(|is| *is)).await.is_ok_and(|is| is.is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field case 4.3.
    #[test]
    fn table_that_changes_without_events_is_read_often() {
        let changes = |seen, gone| Changes { seen, gone };
        let (none, both) = (changes(0, 0), changes(900, 100));
        let mut coverage = EventCoverage::default();
        let mut next = |announced, unannounced| {
            coverage.update(announced, unannounced);
            coverage.next_interval(INTERVAL_MAX / 2)
        };
        assert_eq!(next(none, changes(1_000, 0)), INTERVAL_MIN, "the first reading");
        assert_eq!(next(changes(900, 0), none), INTERVAL_MIN, "nothing shows who deletes");
        assert_eq!(next(both, none), INTERVAL_MAX);
        assert_eq!(next(none, none), INTERVAL_MAX, "nothing has changed");
        assert_eq!(next(both, changes(20, 2)), INTERVAL_MAX, "events that are on their way");
        assert_eq!(next(changes(900, 0), changes(0, 1)), INTERVAL_MIN, "another service deletes");
        assert_eq!(next(changes(900, 0), none), INTERVAL_MIN, "nothing shows that it has stopped");
        assert_eq!(next(changes(0, 10), none), INTERVAL_MAX);
        assert_eq!(next(changes(0, 10), changes(10, 0)), INTERVAL_MIN, "another service records");
    }
}
