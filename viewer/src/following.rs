//! Keeping what is known true: by events, and by looking at the table.

use std::sync::Arc;
use std::time::{Duration, Instant};

use events::{Notice, Subscriber};
use service::PeerStatus;
use store::{Objects, StoreError};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::live::{Live, Sighted, micros_of};

/// Rows read at a time.
const PAGE: u32 = 10_000;
/// How often the table is looked at while events come: what was lost last of all shows by nothing else.
const INTERVAL: Duration = Duration::from_mins(1);
/// How often, while no events come.
const INTERVAL_WITHOUT_EVENTS: Duration = Duration::from_secs(2);
/// Between two readings there is at least so long,
const PAUSE: Duration = Duration::from_secs(1);
/// and at least so many times as long as a reading takes.
const PAUSE_FACTOR: u32 = 10;

/// Hears events, and looks at the table where they may be missing.
pub(crate) struct Following {
    pub(crate) live: Arc<Live>,
    pub(crate) store: store::Config,
    pub(crate) table: watch::Sender<PeerStatus>,
    /// Whether the table was read once; then there is something to show, whatever becomes of it.
    pub(crate) first_reading: watch::Sender<PeerStatus>,
}

impl Following {
    /// Ends only with its task.
    pub(crate) async fn run(self, mut subscriber: Subscriber) {
        let events = subscriber.status();
        let missed = Notify::new();
        let hear = async {
            loop {
                match subscriber.next().await {
                    Notice::Committed(kind, objects) => {
                        let sighted = |object: &events::Object| Sighted {
                            id: object.id,
                            last_seen: micros_of(object.last_seen),
                        };
                        self.live.apply(kind, objects.iter().map(sighted));
                    }
                    Notice::Missed(why) => {
                        tracing::debug!(why, "events may be missing; looking at the table");
                        metrics::counter!("lastseen_viewer_events_missed_total").increment(1);
                        missed.notify_one();
                    }
                }
            }
        };
        tokio::join!(hear, self.look(events, &missed));
    }

    async fn look(&self, mut events: watch::Receiver<PeerStatus>, missed: &Notify) {
        let mut objects = None;
        let mut waits = amqp::backoff();
        loop {
            let began = Instant::now();
            let reason = match self.read(&mut objects).await {
                Ok(()) => {
                    metrics::counter!("lastseen_viewer_readings_total", "outcome" => "ok")
                        .increment(1);
                    waits = amqp::backoff();
                    let before = self.table.send_replace(Ok(()));
                    if before.is_err() {
                        tracing::info!(objects = self.live.len(), "the table is read");
                    }
                    _ = self.first_reading.send_replace(Ok(()));
                    sleep(PAUSE.max(began.elapsed() * PAUSE_FACTOR)).await;
                    self.wait(&mut events, missed).await;
                    continue;
                }
                Err(error) => error.to_string(),
            };
            metrics::counter!("lastseen_viewer_readings_total", "outcome" => "failed").increment(1);
            // It may be of no use any more.
            objects = None;
            if self.first_reading.borrow().is_err() {
                _ = self.first_reading.send_replace(Err(reason.clone()));
            }
            let before = self.table.send_replace(Err(reason.clone()));
            if before.is_ok() {
                tracing::warn!(reason, "the table cannot be read; trying again until it can");
            } else {
                tracing::debug!(reason, "the table still cannot be read");
            }
            sleep(waits.next().unwrap_or(PAUSE)).await;
        }
    }

    /// Until there is a reason to read the table again.
    async fn wait(&self, events: &mut watch::Receiver<PeerStatus>, missed: &Notify) {
        let since = Instant::now();
        loop {
            let they_come = events.borrow_and_update().is_ok();
            let interval = if they_come { INTERVAL } else { INTERVAL_WITHOUT_EVENTS };
            let rest = interval.saturating_sub(since.elapsed());
            tokio::select! {
                () = missed.notified() => return,
                () = sleep(rest) => return,
                changed = events.changed() => if changed.is_err() {
                    // Nobody hears any more, and this task ends.
                    std::future::pending::<()>().await;
                },
            }
        }
    }

    /// Reads the whole table. What is committed meanwhile may be read or not, and is told in any case.
    async fn read(&self, objects: &mut Option<Objects>) -> Result<(), StoreError> {
        let reader = match objects {
            Some(reader) => reader,
            None => objects.insert(Objects::open(&self.store).await?),
        };
        self.live.begin_reading();
        let mut after = None;
        loop {
            let page = reader.page(after, PAGE).await?;
            if let Some(object) = page.iter().find(|object| !object.age.is_zero()) {
                self.live.set_clock(object.last_seen + object.age);
            }
            let Some(last) = page.last() else { break };
            after = Some(last.id);
            let sighted = |object: &store::Object| Sighted {
                id: object.id,
                last_seen: micros_of(object.last_seen),
            };
            self.live.apply(events::Kind::Seen, page.iter().map(sighted));
            // Others have their turn while a large table is read.
            tokio::task::yield_now().await;
        }
        self.live.end_reading();
        Ok(())
    }
}

/// Returns as soon as the status says that it is there, or after a while.
pub(crate) async fn is_there(status: &mut watch::Receiver<bool>, within: Duration) -> bool {
    timeout(within, status.wait_for(|there| *there)).await.is_ok_and(|there| there.is_ok())
}
