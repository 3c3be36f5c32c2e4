//! Keeps the view in sync with the table, by events and by readings: each reading reads all rows.
//!
//! Decision: docs/decisions/0050-how-does-the-viewer-order-events.md

use std::sync::Arc;
use std::time::{Duration, Instant};

use messaging::events::{Kind, Notification, Subscriber};
use parking_lot::Mutex;
use runtime::Status;
use store::{History, Objects, StoreError};
use tokio::sync::{Notify, watch};
use tokio::time::sleep;

use crate::groups::Groups;
use crate::object::{Object, to_micros};
use crate::snapshot::Snapshot;
use crate::view_state::ViewState;

/// Number of rows in one query.
const PAGE_ROWS: u32 = 10_000;
/// Number of rows to apply before other tasks may run.
const ROWS_BETWEEN_YIELDS: usize = 1_000;
/// Interval between readings while events announce all changes; a gap in the events ends it early.
/// Regular readings are needed, because the loss of an event shows only when another one follows.
const INTERVAL_MAX: Duration = Duration::from_mins(1);
/// Interval between readings while no events arrive, or while another program, such as one of the
/// Go services that Lastseen replaces, changes the table without events.
const INTERVAL_MIN: Duration = Duration::from_secs(2);
/// Events count as complete if a reading finds at most one unannounced change among this many
/// changes. Some unannounced changes are normal, because their events may still be on the way.
const CHANGES_PER_UNANNOUNCED: usize = 10;
/// The minimum pause after each reading, which even a gap in the events does not end.
const PAUSE_MIN: Duration = Duration::from_secs(1);
/// The pause is also at least this many times as long as the reading took.
const PAUSE_FACTOR: u32 = 10;

/// Receives events, and reads the table when events may be missing.
pub(crate) struct TableSync {
    pub(crate) view: Arc<ViewState>,
    pub(crate) store: store::Config,
    pub(crate) table_status: watch::Sender<Status>,
    /// `Ok` from the first successful reading on, or from the restoring of a snapshot on, even if the
    /// database cannot be reached later.
    pub(crate) first_reading: watch::Sender<Status>,
    /// `None` if there is no history.
    pub(crate) history: Option<History>,
    pub(crate) snapshot: Option<Arc<Snapshot>>,
    /// The groups that show which objects were given up, if there are any.
    pub(crate) groups: Option<Arc<Groups>>,
}

impl TableSync {
    /// Runs until the tokio task is aborted.
    pub(crate) async fn run(self, mut subscriber: Subscriber) {
        let events = subscriber.status();
        let missed = Notify::new();
        // The changes that events have announced since the last reading.
        let announced = Mutex::new(Changes::default());
        let receive = async {
            loop {
                match subscriber.next().await {
                    Notification::Committed(kind, objects) => {
                        let convert = |object: &messaging::events::Object| Object {
                            id: object.id,
                            last_seen: to_micros(object.last_seen),
                        };
                        let changed = self.view.apply(kind, objects.iter().map(convert));
                        match kind {
                            Kind::Online | Kind::Seen => announced.lock().seen += changed,
                            Kind::Gone => announced.lock().gone += changed,
                        }
                    }
                    // The object may be online nevertheless, so this is not a change of presence.
                    Notification::GivenUp(objects) => {
                        if let Some(groups) = &self.groups {
                            groups.mark_given_up(objects.iter().map(|object| object.id));
                        }
                    }
                    Notification::Missed(why) => {
                        tracing::debug!(why, "events may be missing: reading the table");
                        metrics::counter!("lastseen_viewer_events_missed_total").increment(1);
                        missed.notify_one();
                    }
                }
            }
        };
        tokio::join!(receive, self.read_repeatedly(events, &missed, &announced));
    }

    async fn read_repeatedly(
        &self,
        mut events: watch::Receiver<Status>,
        missed: &Notify,
        announced: &Mutex<Changes>,
    ) {
        let mut delays = messaging::amqp::backoff();
        let mut coverage = EventCoverage::default();
        let mut interval = INTERVAL_MIN;
        let (mut snapshot, mut history_error) = (self.snapshot.clone(), None);
        loop {
            if let Some(earlier) = snapshot.take() {
                let restored = earlier.restore().await;
                if let Ok(true) = restored {
                    _ = self.first_reading.send_replace(Ok(()));
                }
                snapshot = restored.is_err().then_some(earlier);
                history_error = restored.err();
            }
            let started = Instant::now();
            let reason = match self.read().await {
                Ok(unannounced) => {
                    coverage.update(std::mem::take(&mut *announced.lock()), unannounced);
                    interval = coverage.next_interval(interval);
                    metrics::counter!("lastseen_viewer_readings_total", "outcome" => "ok")
                        .increment(1);
                    delays = messaging::amqp::backoff();
                    let previous = self.table_status.send_replace(Ok(()));
                    if previous.is_err() {
                        tracing::info!(objects = self.view.len(), "read the table again");
                    }
                    _ = self.first_reading.send_replace(Ok(()));
                    snapshot = None;
                    if let Some(error) = history_error.take() {
                        tracing::warn!(
                            %error,
                            "cannot read the history: the viewer has read the table without its \
                             snapshot; until the history can be read, no snapshot is saved"
                        );
                    }
                    sleep(PAUSE_MIN.max(started.elapsed() * PAUSE_FACTOR)).await;
                    self.wait_for_next_reading(interval, &mut events, missed).await;
                    continue;
                }
                Err(error) => error.to_string(),
            };
            metrics::counter!("lastseen_viewer_readings_total", "outcome" => "failed").increment(1);
            if self.first_reading.borrow().is_err() {
                _ = self.first_reading.send_replace(Err(reason.clone()));
            }
            let previous = self.table_status.send_replace(Err(reason.clone()));
            if previous.is_ok() {
                tracing::warn!(
                    reason,
                    "cannot read the table: showing the last known objects until it is back"
                );
            } else {
                tracing::debug!(reason, "still cannot read the table");
            }
            sleep(delays.next().unwrap_or(PAUSE_MIN)).await;
        }
    }

    /// Waits until the interval has passed or an event may be missing. While no events can arrive,
    /// the interval is [`INTERVAL_MIN`].
    async fn wait_for_next_reading(
        &self,
        interval: Duration,
        events: &mut watch::Receiver<Status>,
        missed: &Notify,
    ) {
        let since = Instant::now();
        loop {
            let receives_events = events.borrow_and_update().is_ok();
            let interval = if receives_events { interval } else { INTERVAL_MIN };
            let rest = interval.saturating_sub(since.elapsed());
            tokio::select! {
                () = missed.notified() => return,
                () = sleep(rest) => return,
                changed = events.changed() => if changed.is_err() {
                    // The subscriber was dropped, so this task is about to end.
                    std::future::pending::<()>().await;
                },
            }
        }
    }

    /// Reads the whole table. Returns the changes that no event had announced. Changes that are
    /// committed during the reading may be missing from it, but their events will arrive.
    ///
    /// Each reading opens a new connection: after a failover, an old one could still lead to the
    /// former primary.
    async fn read(&self) -> Result<Changes, StoreError> {
        // A reading finds all changes that were settled before it began, even if their events were
        // lost.
        let settled = match &self.history {
            Some(history) => history.settled().await.ok().filter(|position| *position > 0),
            None => None,
        };
        let mut reader = Objects::open(&self.store).await?;
        self.view.begin_reading();
        let mut after = None;
        let mut unannounced = Changes::default();
        loop {
            let page = reader.page(after, PAGE_ROWS).await?;
            // The sum of `last_seen` and `age` is the time of the database's clock, except for a
            // row that is dated in the future, whose age is 0.
            let is_past = |object: &&store::Object| !object.age.is_zero();
            let past = page.iter().find(is_past);
            if let Some(now) = past.and_then(|object| object.last_seen.checked_add(object.age)) {
                self.view.set_clock(now);
            }
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            let convert = |object: &store::Object| Object {
                id: object.id,
                last_seen: to_micros(object.last_seen),
            };
            for rows in page.chunks(ROWS_BETWEEN_YIELDS) {
                unannounced.seen += self.view.apply(Kind::Seen, rows.iter().map(convert));
                tokio::task::yield_now().await;
            }
        }
        unannounced.gone += self.view.end_reading(settled).await;
        Ok(unannounced)
    }
}

/// Numbers of changed objects.
#[derive(Clone, Copy, Default)]
struct Changes {
    seen: usize,
    gone: usize,
}

/// Which kinds of changes are known to come with events. At first this is known of neither kind,
/// because another program may make such changes without events.
#[derive(Default)]
struct EventCoverage {
    seen: bool,
    gone: bool,
}

impl EventCoverage {
    /// Updates the coverage after a reading, with the numbers of changes since the previous one.
    fn update(&mut self, announced: Changes, unannounced: Changes) {
        let updated = |is_covered: bool, announced: usize, unannounced: usize| {
            let changes = announced.saturating_add(unannounced);
            let events_are_missing = unannounced.saturating_mul(CHANGES_PER_UNANNOUNCED) > changes;
            !events_are_missing && (is_covered || announced > 0)
        };
        self.seen = updated(self.seen, announced.seen, unannounced.seen);
        self.gone = updated(self.gone, announced.gone, unannounced.gone);
    }

    /// The interval that follows this one.
    fn next_interval(&self, interval: Duration) -> Duration {
        if self.seen && self.gone {
            interval.saturating_mul(2).min(INTERVAL_MAX)
        } else {
            INTERVAL_MIN
        }
    }
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
        assert_eq!(next(changes(900, 0), none), INTERVAL_MIN, "no deletion has been announced yet");
        assert_eq!(next(both, none), INTERVAL_MAX);
        assert_eq!(next(none, none), INTERVAL_MAX, "nothing changed");
        assert_eq!(next(both, changes(20, 2)), INTERVAL_MAX, "some events are still on their way");
        assert_eq!(next(changes(900, 0), changes(0, 1)), INTERVAL_MIN, "another program deletes");
        assert_eq!(next(changes(900, 0), none), INTERVAL_MIN, "that program may still delete");
        assert_eq!(next(changes(0, 10), none), INTERVAL_MAX);
        assert_eq!(next(changes(0, 10), changes(10, 0)), INTERVAL_MIN, "another program records");
    }
}
