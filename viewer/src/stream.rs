//! One subscriber: a snapshot, or what it has missed, and then each change.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use service::CancellationToken;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::following::is_there;
use crate::live::{Live, Sighted, as_f64};

/// A line comes at least so often, so that both sides notice when the other is gone.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How long a browser waits before it connects again.
const GREETING: &[u8] = b"retry: 1000\n\n";
const STILL_HERE: &[u8] = b":\n\n";

/// How many there are.
#[derive(Clone, Default)]
pub(crate) struct Subscribers(Arc<AtomicUsize>);

impl Subscribers {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    fn add(&self, count: isize) {
        let now = if count > 0 {
            self.0.fetch_add(1, Ordering::Relaxed) + 1
        } else {
            self.0.fetch_sub(1, Ordering::Relaxed) - 1
        };
        metrics::gauge!("lastseen_viewer_subscribers").set(as_f64(now));
    }
}

/// What a subscriber wants.
pub(crate) struct Wanted {
    /// These objects only, in ascending order.
    pub(crate) ids: Option<Vec<i64>>,
    /// What comes after the change of this name, if that can still be had.
    pub(crate) after: Option<String>,
}

/// Everything that a subscriber wants, until the shutdown, or until it is too slow. It holds nothing but
/// a number: what is told lies in the ring, once for all of them.
pub(crate) fn of(
    live: &Arc<Live>,
    subscribers: &Subscribers,
    wanted: Wanted,
    shutdown: CancellationToken,
) -> Body {
    subscribers.add(1);
    let subscription = Subscription {
        live: Arc::clone(live),
        subscribers: subscribers.clone(),
        told: live.told(),
        is_complete: live.is_complete(),
        ids: wanted.ids,
        place: Place::Greeting(wanted.after),
        named: 0,
        shutdown,
    };
    Body::from_stream(stream::unfold(subscription, async |mut subscription| {
        let next = subscription.next().await?;
        Some((Ok::<_, Infallible>(next), subscription))
    }))
}

struct Subscription {
    live: Arc<Live>,
    subscribers: Subscribers,
    told: watch::Receiver<u64>,
    is_complete: watch::Receiver<bool>,
    ids: Option<Vec<i64>>,
    place: Place,
    /// The number of the latest change whose name it was told.
    named: u64,
    shutdown: CancellationToken,
}

/// How far a subscriber has come.
enum Place {
    Greeting(Option<String>),
    Start(Option<String>),
    /// It has all up to this change.
    After(u64),
}

impl Subscription {
    /// The next part of the stream, or its end.
    async fn next(&mut self) -> Option<Bytes> {
        let shutdown = self.shutdown.clone();
        shutdown.run_until_cancelled(self.advance()).await?
    }

    async fn advance(&mut self) -> Option<Bytes> {
        loop {
            match &mut self.place {
                Place::Greeting(after) => {
                    self.place = Place::Start(after.take());
                    return Some(Bytes::from_static(GREETING));
                }
                Place::Start(after) => {
                    if !is_there(&mut self.is_complete, HEARTBEAT).await {
                        return Some(Bytes::from_static(STILL_HERE));
                    }
                    let resumed = after.take().and_then(|name| self.live.sequence_of(&name));
                    if let Some(sequence) = resumed {
                        self.goes_on_after(sequence);
                        continue;
                    }
                    let snapshot = match &self.ids {
                        None => self.live.snapshot().await,
                        Some(ids) => self.live.snapshot_of(ids),
                    };
                    self.goes_on_after(snapshot.sequence);
                    return Some(snapshot.encoded);
                }
                Place::After(sequence) => {
                    let sequence = *sequence;
                    // Looked at before the ring, so that what comes in between wakes it.
                    self.told.borrow_and_update();
                    let Ok(next) = self.live.after(sequence) else {
                        metrics::counter!("lastseen_viewer_slow_subscribers_total").increment(1);
                        return None;
                    };
                    let Some(message) = next else {
                        // The sender is there as long as the ring is.
                        match timeout(HEARTBEAT, self.told.changed()).await {
                            Ok(_) => continue,
                            Err(_) => return Some(self.heartbeat(sequence)),
                        }
                    };
                    self.place = Place::After(message.sequence);
                    let Some(ids) = &self.ids else { return Some(message.encoded.clone()) };
                    let wanted = |object: &&Sighted| ids.binary_search(&object.id).is_ok();
                    let objects: Vec<Sighted> =
                        message.objects.iter().filter(wanted).copied().collect();
                    if !objects.is_empty() {
                        self.named = message.sequence;
                        let (kind, sequence) = (message.kind.name(), message.sequence);
                        return Some(self.live.encode(kind, sequence, &objects));
                    }
                }
            }
        }
    }

    fn goes_on_after(&mut self, sequence: u64) {
        self.place = Place::After(sequence);
        self.named = sequence;
    }

    /// To one who wants some objects only, it also names the latest change: once the ring has left
    /// behind the last one that it was told, it could not resume there.
    fn heartbeat(&mut self, sequence: u64) -> Bytes {
        if self.ids.is_none() || self.named == sequence {
            return Bytes::from_static(STILL_HERE);
        }
        self.named = sequence;
        Bytes::from(format!("id: {}\n\n", self.live.name(sequence)))
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.subscribers.add(-1);
    }
}

#[cfg(test)]
mod tests {
    use events::Kind;

    use super::*;

    fn subscription(live: &Arc<Live>, ids: Option<Vec<i64>>, after: u64) -> Subscription {
        let subscribers = Subscribers::default();
        subscribers.add(1);
        Subscription {
            live: Arc::clone(live),
            subscribers,
            told: live.told(),
            is_complete: live.is_complete(),
            ids,
            place: Place::After(after),
            named: after,
            shutdown: CancellationToken::new(),
        }
    }

    /// Tells each by itself.
    fn tell(live: &Live, times: std::ops::RangeInclusive<i64>) {
        for last_seen in times {
            live.apply(Kind::Seen, std::iter::once(Sighted { id: 1, last_seen }));
            live.snapshot_of(&[]);
        }
    }

    #[tokio::test]
    async fn who_is_too_slow_for_the_ring_is_dropped_and_others_go_on() {
        let live = Arc::new(Live::new());
        let (mut slow, mut quick) = (subscription(&live, None, 0), subscription(&live, None, 0));
        for time in 1..=5_000 {
            tell(&live, time..=time);
            assert!(quick.next().await.is_some(), "{time}");
        }
        assert!(slow.next().await.is_none());
    }

    #[tokio::test]
    async fn all_subscribers_share_one_encoded_message() {
        let live = Arc::new(Live::new());
        let subscriptions = [(); 3].map(|()| subscription(&live, None, 0));
        tell(&live, 1..=1);
        let mut places = Vec::new();
        for mut subscription in subscriptions {
            places.push(subscription.next().await.unwrap().as_ptr());
        }
        assert!(places.iter().all(|place| *place == places[0]));
    }

    #[test]
    fn a_heartbeat_names_what_a_subscriber_of_some_objects_was_not_told() {
        let live = Arc::new(Live::new());
        let mut some = subscription(&live, Some(vec![2]), 0);
        assert_eq!(some.heartbeat(0), STILL_HERE);
        tell(&live, 1..=3);
        let name = format!("id: {}\n\n", live.name(3));
        assert_eq!(some.heartbeat(3), name.as_bytes());
        assert_eq!(some.heartbeat(3), STILL_HERE);
        assert_eq!(live.sequence_of(&live.name(3)), Some(3));
    }
}
