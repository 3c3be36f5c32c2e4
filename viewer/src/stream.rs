//! The event stream of one subscriber: a list of the online objects, or the changes that it missed,
//! and then each change.
//!
//! Decision: docs/decisions/0051-how-does-a-subscriber-follow-the-stream.md

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use events::Kind;
use futures_util::stream;
use service::CancellationToken;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::table_sync::wait_until_true;
use crate::view_state::{self, Change, NextItem, Object, TooFarBehind, ViewState, as_f64};

/// The stream sends a line at least this often, so that each side notices the loss of the other.
const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(15);
/// The first block: sets how long browsers wait before they reconnect.
const RETRY_HINT: &[u8] = b"retry: 1000\n\n";
/// An empty comment, which clients ignore.
const HEARTBEAT: &[u8] = b":\n\n";
/// Number of skipped changes after which the stream lets other tasks run.
const SKIPPED_BETWEEN_YIELDS: usize = 64;
/// The last block for a subscriber that reads more slowly than objects change. It asks for a long
/// pause, because reconnecting at once would not help.
const TOO_SLOW: &[u8] =
    b"retry: 30000\n: too slow to follow all changes; request fewer objects with ?ids= or ?limit=\n\n";

/// Counts the subscribers.
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

/// The parameters of a subscription.
#[derive(Debug, Default)]
pub(crate) struct Request {
    /// Only these objects, in ascending order.
    pub(crate) ids: Option<Box<[i64]>>,
    /// Approximate maximum number of listed objects.
    pub(crate) limit: Option<usize>,
    /// Resume after the event with this id, if the ring still has the changes since.
    pub(crate) after: Option<String>,
}

/// Builds the body of an event stream, which ends at the shutdown or when the subscriber is too
/// slow.
///
/// A subscription holds only a cursor and at most one event: the ring holds each change once for
/// all subscribers, and objects are read from the table as fast as the subscriber receives them.
pub(crate) fn body(
    view: &Arc<ViewState>,
    subscribers: &Subscribers,
    request: Request,
    shutdown: CancellationToken,
) -> Body {
    subscribers.add(1);
    let subscription = Subscription {
        view: Arc::clone(view),
        subscribers: subscribers.clone(),
        published: view.published(),
        is_complete: view.is_complete(),
        ids: request.ids,
        limit: request.limit,
        stage: Stage::Opening(request.after),
        shutdown,
    };
    Body::from_stream(stream::unfold(subscription, async |mut subscription| {
        let next = subscription.next().await?;
        Some((Ok::<_, Infallible>(next), subscription))
    }))
}

struct Subscription {
    view: Arc<ViewState>,
    subscribers: Subscribers,
    published: watch::Receiver<u64>,
    is_complete: watch::Receiver<bool>,
    ids: Option<Box<[i64]>>,
    limit: Option<usize>,
    stage: Stage,
    shutdown: CancellationToken,
}

enum Stage {
    /// Nothing is sent yet. The value is the event id to resume after.
    Opening(Option<String>),
    /// Waits until the viewer has read the table.
    AwaitingTable(Option<String>),
    Following(Cursor),
    Ended,
}

/// The position of a subscriber in the list of objects and in the changes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cursor {
    /// The subscriber has all changes of listed objects up to this number.
    sequence: u64,
    /// The change number in the latest event id that the subscriber got.
    sent_sequence: u64,
    /// The lowest id that is not listed yet; the subscriber gets no changes of objects from there
    /// on. `None` if all objects are listed.
    next_id: Option<i64>,
    /// The number of listed objects that are online.
    online: usize,
    listing: Listing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listing {
    /// Nothing is listed yet. The first part replaces all that the subscriber knows.
    First,
    /// Further objects must be listed.
    Further,
    /// All objects are listed, or as many as the limit allows.
    Done,
}

impl Cursor {
    fn new(sequence: u64) -> Self {
        let (next_id, listing) = (Some(i64::MIN), Listing::First);
        Self { sequence, sent_sequence: sequence, next_id, online: 0, listing }
    }

    /// Parses the rest of an event id, after the change number. `online` is the size of the table.
    fn resume(sequence: u64, rest: &str, online: usize, limit: usize) -> Option<Self> {
        let (next_id, online) = match rest {
            "" => (None, online),
            rest => {
                // The id may be negative, so its sign is not the separator.
                let (next_id, online) = rest.rsplit_once('-')?;
                (Some(next_id.parse().ok()?), online.parse().ok()?)
            }
        };
        let is_done = next_id.is_none() || online >= limit;
        let listing = if is_done { Listing::Done } else { Listing::Further };
        Some(Self { sequence, sent_sequence: sequence, next_id, online, listing })
    }

    /// The id of an event, with which the subscriber can resume after it.
    fn event_id(&self, view: &ViewState) -> String {
        let event_id = view.event_id(self.sequence);
        match self.next_id {
            None => event_id,
            Some(next_id) => format!("{event_id}-{next_id}-{}", self.online),
        }
    }
}

impl Subscription {
    /// The next block of the stream, or `None` at its end.
    async fn next(&mut self) -> Option<Bytes> {
        let shutdown = self.shutdown.clone();
        shutdown.run_until_cancelled(self.advance()).await?
    }

    async fn advance(&mut self) -> Option<Bytes> {
        loop {
            match &mut self.stage {
                Stage::Opening(after) => {
                    self.stage = Stage::AwaitingTable(after.take());
                    return Some(Bytes::from_static(RETRY_HINT));
                }
                Stage::AwaitingTable(after) => {
                    if !wait_until_true(&mut self.is_complete, HEARTBEAT_INTERVAL).await {
                        return Some(Bytes::from_static(HEARTBEAT));
                    }
                    let after = after.take();
                    let (cursor, event) = self.start(after.as_deref());
                    self.stage = Stage::Following(cursor);
                    if event.is_some() {
                        return event;
                    }
                }
                Stage::Following(_) => {
                    // Marked as seen before reading the ring, so that a change in between wakes
                    // this subscriber.
                    self.published.borrow_and_update();
                    match self.next_event().await {
                        Ok(Some(event)) => return Some(event),
                        Ok(None) => {}
                        Err(TooFarBehind) => {
                            metrics::counter!("lastseen_viewer_slow_subscribers_total")
                                .increment(1);
                            self.stage = Stage::Ended;
                            return Some(Bytes::from_static(TOO_SLOW));
                        }
                    }
                    // The sender lives as long as the ring, so `changed` does not fail.
                    if timeout(HEARTBEAT_INTERVAL, self.published.changed()).await.is_err() {
                        return Some(self.heartbeat());
                    }
                }
                Stage::Ended => return None,
            }
        }
    }

    /// The cursor at which the stream starts, and the event `resumed` if it continues an earlier
    /// one.
    fn start(&self, after: Option<&str>) -> (Cursor, Option<Bytes>) {
        let resumed = after.and_then(|event_id| self.view.parse_event_id(event_id));
        let resumed = resumed.and_then(|(sequence, rest)| {
            Cursor::resume(sequence, rest, self.view.len(), self.limit.unwrap_or(usize::MAX))
        });
        let Some(cursor) = resumed else { return (Cursor::new(self.view.last()), None) };
        let event_id = cursor.event_id(&self.view);
        let event = view_state::encode("resumed", &event_id, &[], Some(cursor.remaining()));
        (cursor, Some(event))
    }

    /// The next event, if there is one. Changes come before further objects, so that the list
    /// matches the changes sent so far.
    async fn next_event(&mut self) -> Result<Option<Bytes>, TooFarBehind> {
        let limit = self.limit.unwrap_or(usize::MAX);
        for round in 1_usize.. {
            // Otherwise many long lists at once would delay all other requests.
            if round % SKIPPED_BETWEEN_YIELDS == 0 || self.is_listing() {
                tokio::task::yield_now().await;
            }
            let Stage::Following(cursor) = &mut self.stage else { return Ok(None) };
            let first = cursor.next_id.filter(|_| cursor.listing != Listing::Done);
            let request = first.map(|first| {
                let limit = limit.saturating_sub(cursor.online);
                view_state::ListRequest { first, ids: self.ids.as_deref(), limit }
            });
            match self.view.next_item(cursor.sequence, request)? {
                NextItem::UpToDate => return Ok(None),
                NextItem::Objects(batch) => {
                    let event = if cursor.listing == Listing::First { "snapshot" } else { "more" };
                    cursor.next_id = batch.next_id;
                    cursor.online = cursor.online.saturating_add(batch.objects.len());
                    let is_done = cursor.next_id.is_none() || cursor.online >= limit;
                    cursor.listing = if is_done { Listing::Done } else { Listing::Further };
                    cursor.sent_sequence = cursor.sequence;
                    let (event_id, remaining) = (cursor.event_id(&self.view), cursor.remaining());
                    let objects = &batch.objects;
                    let event = view_state::encode(event, &event_id, objects, Some(remaining));
                    return Ok(Some(event));
                }
                NextItem::Change(change) if self.ids.is_none() && cursor.next_id.is_none() => {
                    cursor.sequence = change.sequence;
                    cursor.sent_sequence = change.sequence;
                    cursor.update_online(change.kind, change.objects.len());
                    cursor.adjust_to_limit(limit);
                    return Ok(Some(change.encoded.clone()));
                }
                NextItem::Change(change) => {
                    let objects = cursor.apply(&change, self.ids.as_deref());
                    cursor.update_online(change.kind, objects.len());
                    if !objects.is_empty() {
                        let event_id = cursor.event_id(&self.view);
                        cursor.sent_sequence = cursor.sequence;
                        cursor.adjust_to_limit(limit);
                        let kind = change.kind.name();
                        return Ok(Some(view_state::encode(kind, &event_id, &objects, None)));
                    }
                }
            }
        }
        Ok(None)
    }

    fn is_listing(&self) -> bool {
        matches!(&self.stage, Stage::Following(cursor) if cursor.listing != Listing::Done)
    }

    /// A comment, or the latest event id if the subscriber skipped changes: the ring may soon drop
    /// the last change that it was sent, and then it could not resume there.
    fn heartbeat(&mut self) -> Bytes {
        match &mut self.stage {
            Stage::Following(cursor) if cursor.sent_sequence != cursor.sequence => {
                cursor.sent_sequence = cursor.sequence;
                Bytes::from(format!("id: {}\n\n", cursor.event_id(&self.view)))
            }
            _ => Bytes::from_static(HEARTBEAT),
        }
    }
}

impl Cursor {
    /// The value of the field `remaining`: whether the list of objects continues.
    fn remaining(&self) -> &'static str {
        match (self.next_id, self.listing) {
            (None, _) => "none",
            (Some(_), Listing::Done) => "over_limit",
            (Some(_), Listing::First | Listing::Further) => "follow",
        }
    }

    /// Moves the cursor to a change. Returns the objects of the change that the subscriber must
    /// get.
    fn apply(&mut self, change: &Change, ids: Option<&[i64]>) -> Vec<Object> {
        self.sequence = change.sequence;
        let is_listed = |object: &&Object| self.next_id.is_none_or(|next| object.id < next);
        let is_requested =
            |object: &&Object| ids.is_none_or(|ids| ids.binary_search(&object.id).is_ok());
        change.objects.iter().filter(is_listed).filter(is_requested).copied().collect()
    }

    /// Counts the objects of a change.
    fn update_online(&mut self, kind: Kind, objects: usize) {
        self.online = match kind {
            Kind::Online => self.online.saturating_add(objects),
            Kind::Gone => self.online.saturating_sub(objects),
            Kind::Seen => self.online,
        };
    }

    /// Lists further objects once the listed ones are a quarter below the limit, and starts a new
    /// snapshot once they are a quarter above it.
    fn adjust_to_limit(&mut self, limit: usize) {
        let quarter = limit / 4;
        if self.online > limit.saturating_add(quarter) {
            *self = Self::new(self.sequence);
        } else if self.next_id.is_some() && self.online < limit - quarter {
            self.listing = Listing::Further;
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.subscribers.add(-1);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn subscription(view: &Arc<ViewState>, request: Request) -> Subscription {
        let subscribers = Subscribers::default();
        subscribers.add(1);
        Subscription {
            view: Arc::clone(view),
            subscribers,
            published: view.published(),
            is_complete: view.is_complete(),
            ids: request.ids,
            limit: request.limit,
            stage: Stage::AwaitingTable(request.after),
            shutdown: CancellationToken::new(),
        }
    }

    /// A view with these objects online, all published.
    async fn view(ids: std::ops::Range<i64>) -> Arc<ViewState> {
        let view = Arc::new(ViewState::new());
        change(&view, Kind::Online, ids, 1);
        view.end_reading().await;
        view
    }

    /// Applies and publishes one change.
    fn change(view: &ViewState, kind: Kind, ids: impl IntoIterator<Item = i64>, last_seen: i64) {
        view.apply(kind, ids.into_iter().map(|id| Object { id, last_seen }));
        view.flush();
    }

    /// The kind, the ids and `remaining` of the next event.
    async fn event(subscription: &mut Subscription) -> (String, Vec<i64>, String) {
        let (event, _) = event_with_id(subscription).await;
        event
    }

    async fn event_with_id(
        subscription: &mut Subscription,
    ) -> ((String, Vec<i64>, String), String) {
        let text = subscription.next().await.unwrap();
        let text = std::str::from_utf8(&text).unwrap();
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let data: serde_json::Value = serde_json::from_str(field("data: ")).unwrap();
        let ids = data["objects"].as_array().unwrap().iter();
        let ids = ids.map(|object| object["id"].as_str().unwrap().parse().unwrap()).collect();
        let remaining = data["remaining"].as_str().unwrap_or_default().to_owned();
        ((field("event: ").to_owned(), ids, remaining), field("id: ").to_owned())
    }

    fn expected(
        name: &str,
        ids: impl IntoIterator<Item = i64>,
        remaining: &str,
    ) -> (String, Vec<i64>, String) {
        (name.to_owned(), ids.into_iter().collect(), remaining.to_owned())
    }

    #[tokio::test]
    async fn too_slow_subscriber_is_disconnected_others_continue() {
        let view = view(0..0).await;
        let (mut slow, mut fast) =
            (subscription(&view, Request::default()), subscription(&view, Request::default()));
        event(&mut slow).await;
        event(&mut fast).await;
        for time in 1..=20_000 {
            change(&view, Kind::Seen, [1], time);
            assert!(fast.next().await.is_some(), "{time}");
        }
        assert_eq!(slow.next().await.unwrap(), TOO_SLOW);
        assert!(slow.next().await.is_none());
    }

    #[tokio::test]
    async fn all_subscribers_share_one_encoded_change() {
        let view = view(0..0).await;
        let mut subscriptions = [(); 3].map(|()| subscription(&view, Request::default()));
        for subscription in &mut subscriptions {
            event(subscription).await;
        }
        change(&view, Kind::Online, [1], 1);
        let mut pointers = Vec::new();
        for subscription in &mut subscriptions {
            pointers.push(subscription.next().await.unwrap().as_ptr());
        }
        assert!(pointers.iter().all(|pointer| *pointer == pointers[0]));
    }

    // Field case 2.2
    #[tokio::test]
    async fn snapshot_comes_in_parts_with_changes_in_between() {
        let view = view(0..300).await;
        let mut all = subscription(&view, Request::default());
        assert_eq!(event(&mut all).await, expected("snapshot", 0..128, "follow"));
        // Changes of 200 and 201 are not sent, because the list will contain their later state.
        change(&view, Kind::Seen, [5, 200], 2);
        change(&view, Kind::Gone, [7, 201], 2);
        assert_eq!(event(&mut all).await, expected("seen", [5], ""));
        assert_eq!(event(&mut all).await, expected("gone", [7], ""));
        let second: Vec<i64> = (128..201).chain(202..257).collect();
        assert_eq!(event(&mut all).await, expected("more", second, "follow"));
        // Not published yet, so it comes as a change after the list.
        view.apply(Kind::Online, std::iter::once(Object { id: 1_000, last_seen: 3 }));
        assert_eq!(event(&mut all).await, expected("more", 257..300, "none"));
        view.flush();
        assert_eq!(event(&mut all).await, expected("online", [1_000], ""));
    }

    #[tokio::test]
    async fn stream_yields_to_other_tasks_before_each_part_of_a_list() {
        let view = view(0..300).await;
        let mut all = subscription(&view, Request::default());
        for _ in 0..3 {
            assert!(all.next().now_or_never().is_none());
            event(&mut all).await;
        }
    }

    #[tokio::test]
    async fn snapshot_resumes_where_it_was_interrupted() {
        let view = view(-300..0).await;
        let mut first = subscription(&view, Request::default());
        assert_eq!(event(&mut first).await, expected("snapshot", -300..-172, "follow"));
        let (more, event_id) = event_with_id(&mut first).await;
        assert_eq!(more, expected("more", -172..-44, "follow"));
        change(&view, Kind::Seen, [-200], 2);
        let after = Some(event_id);
        let mut second = subscription(&view, Request { after, ..Request::default() });
        assert_eq!(event(&mut second).await, expected("resumed", [], "follow"));
        assert_eq!(event(&mut second).await, expected("seen", [-200], ""));
        let (more, event_id) = event_with_id(&mut second).await;
        assert_eq!(more, expected("more", -44..0, "none"));
        assert_eq!(event_id, view.event_id(view.last()));
    }

    #[tokio::test]
    async fn limit_restricts_the_stream_to_the_lowest_ids() {
        let view = view(0..300).await;
        let mut some = subscription(&view, Request { limit: Some(100), ..Request::default() });
        let (snapshot, event_id) = event_with_id(&mut some).await;
        assert_eq!(snapshot, expected("snapshot", 0..100, "over_limit"));
        change(&view, Kind::Seen, 90..200, 2);
        assert_eq!(event(&mut some).await, expected("seen", 90..100, ""));
        // Once a quarter is gone, further objects are listed.
        change(&view, Kind::Gone, 0..30, 2);
        assert_eq!(event(&mut some).await, expected("gone", 0..30, ""));
        assert_eq!(event(&mut some).await, expected("more", 100..130, "over_limit"));
        // With a quarter more, a new snapshot comes.
        change(&view, Kind::Online, 0..30, 3);
        assert_eq!(event(&mut some).await, expected("online", 0..30, ""));
        assert_eq!(event(&mut some).await, expected("snapshot", 0..100, "over_limit"));

        let request = Request { limit: Some(100), after: Some(event_id), ..Request::default() };
        let mut resumed = subscription(&view, request);
        assert_eq!(event(&mut resumed).await, expected("resumed", [], "over_limit"));
        assert_eq!(event(&mut resumed).await, expected("seen", 90..100, ""));
        assert_eq!(event(&mut resumed).await, expected("gone", 0..30, ""));
    }

    #[tokio::test]
    async fn snapshot_below_the_limit_is_followed_by_all_changes() {
        let view = view(0..3).await;
        let mut some = subscription(&view, Request { limit: Some(4), ..Request::default() });
        assert_eq!(event(&mut some).await, expected("snapshot", 0..3, "none"));
        change(&view, Kind::Online, [50, 60], 2);
        assert_eq!(event(&mut some).await, expected("online", [50, 60], ""));
        change(&view, Kind::Online, [70], 2);
        assert_eq!(event(&mut some).await, expected("online", [70], ""));
        let four = [0, 1, 2, 50];
        assert_eq!(event(&mut some).await, expected("snapshot", four, "over_limit"));
    }

    #[tokio::test]
    async fn heartbeat_carries_the_id_of_skipped_changes() {
        let view = view(0..0).await;
        let ids = Some(Box::from([2]));
        let mut some = subscription(&view, Request { ids, ..Request::default() });
        event(&mut some).await;
        assert_eq!(some.heartbeat(), HEARTBEAT);
        change(&view, Kind::Online, [1], 1);
        assert_eq!(some.next_event().await, Ok(None));
        let line = format!("id: {}\n\n", view.event_id(view.last()));
        assert_eq!(some.heartbeat(), line.as_bytes());
        assert_eq!(some.heartbeat(), HEARTBEAT);
    }

    #[test]
    fn invalid_event_ids_are_not_resumed() {
        for rest in ["-", "1", "1-", "x-1", "1--1", "9223372036854775808-1", "1-1-"] {
            assert_eq!(Cursor::resume(1, rest, 0, 10), None, "{rest}");
        }
        let negative = Cursor::resume(1, "-5-3", 0, 10).unwrap();
        assert_eq!((negative.next_id, negative.online), (Some(-5), 3));
    }
}
