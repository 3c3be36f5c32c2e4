//! Keeps the view up to date: by events, and by reading the table.

use std::sync::Arc;
use std::time::{Duration, Instant};

use events::{Notice, Subscriber};
use service::PeerStatus;
use store::{Objects, StoreError};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::view_state::{Sighted, ViewState, micros_of};

/// Rows read at a time.
const PAGE: u32 = 10_000;
/// Rows applied before everything else that runs has its turn.
const ROWS_AT_ONCE: usize = 1_000;
/// How often the table is read while events cover its changes: nothing else shows the loss of the latest
/// event.
const INTERVAL_MAX: Duration = Duration::from_mins(1);
/// How often it is read while no events come, or something else changes the table without any, such as
/// the Go services.
const INTERVAL_MIN: Duration = Duration::from_secs(2);
/// The table is taken to change without events if a reading finds that more than one in this many objects
/// has. Fewer are those whose events are still on their way.
const UNANNOUNCED_SHARE: usize = 10;
/// The least pause between two readings,
const PAUSE: Duration = Duration::from_secs(1);
/// which is also this many times as long as a reading takes.
const PAUSE_FACTOR: u32 = 10;

/// Receives events, and reads the table where they may be missing.
pub(crate) struct TableSync {
    pub(crate) view: Arc<ViewState>,
    pub(crate) store: store::Config,
    pub(crate) table: watch::Sender<PeerStatus>,
    /// Whether the table was read once; then there is something to show, whatever happens to the table.
    pub(crate) first_reading: watch::Sender<PeerStatus>,
}

impl TableSync {
    /// Ends only with its task.
    pub(crate) async fn run(self, mut subscriber: Subscriber) {
        let events = subscriber.status();
        let missed = Notify::new();
        let receive = async {
            loop {
                match subscriber.next().await {
                    Notice::Committed(kind, objects) => {
                        let sighted = |object: &events::Object| Sighted {
                            id: object.id,
                            last_seen: micros_of(object.last_seen),
                        };
                        self.view.apply(kind, objects.iter().map(sighted));
                    }
                    Notice::Missed(why) => {
                        tracing::debug!(why, "events may be missing: reading the table");
                        metrics::counter!("lastseen_viewer_events_missed_total").increment(1);
                        missed.notify_one();
                    }
                }
            }
        };
        tokio::join!(receive, self.keep_reading(events, &missed));
    }

    async fn keep_reading(&self, mut events: watch::Receiver<PeerStatus>, missed: &Notify) {
        let mut waits = amqp::backoff();
        let mut interval = INTERVAL_MIN;
        loop {
            let began = Instant::now();
            let reason = match self.read().await {
                Ok(reading) => {
                    interval = reading.next_interval(interval);
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
        events: &mut watch::Receiver<PeerStatus>,
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
    ///
    /// Each reading has a connection of its own: after a failover, one that was kept could lead to the
    /// former primary, which answers for as long as it runs.
    async fn read(&self) -> Result<Reading, StoreError> {
        let mut reader = Objects::open(&self.store).await?;
        self.view.begin_reading();
        let mut after = None;
        let mut reading = Reading::default();
        loop {
            let page = reader.page(after, PAGE).await?;
            reading.objects += page.len();
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
                reading.unannounced +=
                    self.view.apply(events::Kind::Seen, rows.iter().map(sighted));
                tokio::task::yield_now().await;
            }
        }
        reading.unannounced += self.view.end_reading().await;
        Ok(reading)
    }
}

/// What a reading of the table has found.
#[derive(Default)]
struct Reading {
    objects: usize,
    /// Objects that had changed without an event.
    unannounced: usize,
}

impl Reading {
    /// When to read the table again, if the last interval was `interval`.
    fn next_interval(&self, interval: Duration) -> Duration {
        if self.unannounced.saturating_mul(UNANNOUNCED_SHARE) > self.objects {
            INTERVAL_MIN
        } else {
            interval.saturating_mul(2).min(INTERVAL_MAX)
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
        let reading = |unannounced| Reading { objects: 1_000, unannounced };
        assert_eq!(reading(500).next_interval(INTERVAL_MAX), INTERVAL_MIN);
        assert_eq!(reading(20).next_interval(INTERVAL_MIN), 2 * INTERVAL_MIN);
        assert_eq!(reading(0).next_interval(INTERVAL_MAX), INTERVAL_MAX);
        assert_eq!(Reading::default().next_interval(INTERVAL_MIN), 2 * INTERVAL_MIN);
        let only_gone = Reading { objects: 0, unannounced: 1 };
        assert_eq!(only_gone.next_interval(INTERVAL_MAX), INTERVAL_MIN);
    }
}
