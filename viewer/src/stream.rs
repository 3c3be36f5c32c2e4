//! One subscriber: what is online, or what it has missed, and then each change.
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

use crate::table_sync::is_true;
use crate::view_state::{self, Message, Sighted, Step, TooFarBehind, ViewState, as_f64};

/// A line is sent at least this often, so that both sides notice when the other is gone.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How long a browser waits before it connects again.
const GREETING: &[u8] = b"retry: 1000\n\n";
const STILL_HERE: &[u8] = b":\n\n";
/// Changes that are about no object of a subscriber take turns with everything else that runs after so many.
const UNWANTED_MAX: usize = 64;
/// The end for a subscriber that reads more slowly than objects change. Reconnecting at once would not help it.
const TOO_SLOW: &[u8] = b"retry: 30000\n: too slow to follow all changes; ask for fewer objects with ?ids= or ?limit=\n\n";

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

/// What a subscriber asks for.
#[derive(Debug, Default)]
pub(crate) struct Request {
    /// These objects only, in ascending order.
    pub(crate) ids: Option<Box<[i64]>>,
    /// About this many objects at a time.
    pub(crate) limit: Option<usize>,
    /// The changes after the event with this name, if they can still be had.
    pub(crate) after: Option<String>,
}

/// Everything that a subscriber asks for, until the shutdown, or until it is too slow. It holds a position and at
/// most one event of its own: changes are in the ring, once for all subscribers, and objects are read from the table
/// as fast as it takes them.
pub(crate) fn of(
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
        stage: Stage::Greeting(request.after),
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
    Greeting(Option<String>),
    /// The table has not been read yet.
    Waiting(Option<String>),
    Following(Cursor),
    Ended,
}

/// How far a subscriber has come.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Cursor {
    /// It has all changes up to this one that are about the objects listed to it.
    sequence: u64,
    /// The number in the last event that it was sent.
    named: u64,
    /// Where the objects begin that were not listed to it: it gets no changes of those. `None` if all were listed.
    next: Option<i64>,
    /// How many objects are online among those listed to it.
    online: usize,
    listing: Listing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listing {
    /// Nothing has been listed; the first list replaces whatever the subscriber knows.
    First,
    /// Further objects are to be listed.
    Further,
    /// As many as it asked for are listed, or all.
    Done,
}

impl Cursor {
    fn new(sequence: u64) -> Self {
        let (next, listing) = (Some(i64::MIN), Listing::First);
        Self { sequence, named: sequence, next, online: 0, listing }
    }

    /// Reads what follows the number in the name of an event.
    fn resumed(sequence: u64, rest: &str, online: usize, limit: usize) -> Option<Self> {
        let (next, online) = match rest {
            "" => (None, online),
            rest => {
                // The id may be negative, so its sign is not the separator.
                let (next, online) = rest.rsplit_once('-')?;
                (Some(next.parse().ok()?), online.parse().ok()?)
            }
        };
        let is_done = next.is_none() || online >= limit;
        let listing = if is_done { Listing::Done } else { Listing::Further };
        Some(Self { sequence, named: sequence, next, online, listing })
    }

    /// The name of an event, by which the subscriber can resume after it.
    fn name(&self, view: &ViewState) -> String {
        let name = view.name(self.sequence);
        match self.next {
            None => name,
            Some(next) => format!("{name}-{next}-{}", self.online),
        }
    }
}

impl Subscription {
    /// The next part of the stream, or its end.
    async fn next(&mut self) -> Option<Bytes> {
        let shutdown = self.shutdown.clone();
        shutdown.run_until_cancelled(self.advance()).await?
    }

    async fn advance(&mut self) -> Option<Bytes> {
        loop {
            match &mut self.stage {
                Stage::Greeting(after) => {
                    self.stage = Stage::Waiting(after.take());
                    return Some(Bytes::from_static(GREETING));
                }
                Stage::Waiting(after) => {
                    if !is_true(&mut self.is_complete, HEARTBEAT).await {
                        return Some(Bytes::from_static(STILL_HERE));
                    }
                    let after = after.take();
                    let (cursor, event) = self.begin(after.as_deref());
                    self.stage = Stage::Following(cursor);
                    if event.is_some() {
                        return event;
                    }
                }
                Stage::Following(_) => {
                    // Looked at before the ring, so that a change in between wakes this subscriber.
                    self.published.borrow_and_update();
                    match self.step().await {
                        Ok(Some(event)) => return Some(event),
                        Ok(None) => {}
                        Err(TooFarBehind) => {
                            metrics::counter!("lastseen_viewer_slow_subscribers_total")
                                .increment(1);
                            self.stage = Stage::Ended;
                            return Some(Bytes::from_static(TOO_SLOW));
                        }
                    }
                    // The sender exists as long as the ring.
                    if timeout(HEARTBEAT, self.published.changed()).await.is_err() {
                        return Some(self.heartbeat());
                    }
                }
                Stage::Ended => return None,
            }
        }
    }

    /// Where the stream begins, and the event that says so if it resumes an earlier one.
    fn begin(&self, after: Option<&str>) -> (Cursor, Option<Bytes>) {
        let resumed = after.and_then(|name| self.view.sequence_of(name));
        let resumed = resumed.and_then(|(sequence, rest)| {
            Cursor::resumed(sequence, rest, self.view.len(), self.limit.unwrap_or(usize::MAX))
        });
        let Some(cursor) = resumed else { return (Cursor::new(self.view.last()), None) };
        let name = cursor.name(&self.view);
        let event = view_state::encode("resumed", &name, &[], Some(cursor.remaining()));
        (cursor, Some(event))
    }

    /// The next event, if there is one. Changes come before further objects, so that both fit together.
    async fn step(&mut self) -> Result<Option<Bytes>, TooFarBehind> {
        let limit = self.limit.unwrap_or(usize::MAX);
        for turn in 1_usize.. {
            // Many long lists at once would hold up every other request.
            if turn % UNWANTED_MAX == 0 || self.is_listing() {
                tokio::task::yield_now().await;
            }
            let Stage::Following(cursor) = &mut self.stage else { return Ok(None) };
            let wanted = cursor.next.filter(|_| cursor.listing != Listing::Done).map(|first| {
                let limit = limit.saturating_sub(cursor.online);
                view_state::Wanted { first, ids: self.ids.as_deref(), limit }
            });
            match self.view.step(cursor.sequence, wanted)? {
                Step::UpToDate => return Ok(None),
                Step::Listed(listed) => {
                    let event = if cursor.listing == Listing::First { "snapshot" } else { "more" };
                    cursor.next = listed.next;
                    cursor.online = cursor.online.saturating_add(listed.objects.len());
                    let is_done = cursor.next.is_none() || cursor.online >= limit;
                    cursor.listing = if is_done { Listing::Done } else { Listing::Further };
                    cursor.named = cursor.sequence;
                    let (name, remaining) = (cursor.name(&self.view), Some(cursor.remaining()));
                    return Ok(Some(view_state::encode(event, &name, &listed.objects, remaining)));
                }
                Step::Change(message) if self.ids.is_none() && cursor.next.is_none() => {
                    cursor.sequence = message.sequence;
                    cursor.named = message.sequence;
                    cursor.count(message.kind, message.objects.len());
                    cursor.keep_to(limit);
                    return Ok(Some(message.encoded.clone()));
                }
                Step::Change(message) => {
                    let objects = cursor.take(&message, self.ids.as_deref());
                    cursor.count(message.kind, objects.len());
                    if !objects.is_empty() {
                        let name = cursor.name(&self.view);
                        cursor.named = cursor.sequence;
                        cursor.keep_to(limit);
                        let kind = message.kind.name();
                        return Ok(Some(view_state::encode(kind, &name, &objects, None)));
                    }
                }
            }
        }
        Ok(None)
    }

    fn is_listing(&self) -> bool {
        matches!(&self.stage, Stage::Following(cursor) if cursor.listing != Listing::Done)
    }

    /// To a subscriber that follows some objects only, it also names the latest change: once the ring has left
    /// behind the last one that it was sent, it could not resume there.
    fn heartbeat(&mut self) -> Bytes {
        match &mut self.stage {
            Stage::Following(cursor) if cursor.named != cursor.sequence => {
                cursor.named = cursor.sequence;
                Bytes::from(format!("id: {}\n\n", cursor.name(&self.view)))
            }
            _ => Bytes::from_static(STILL_HERE),
        }
    }
}

impl Cursor {
    /// What a list says about the objects after it.
    fn remaining(&self) -> &'static str {
        match (self.next, self.listing) {
            (None, _) => "none",
            (Some(_), Listing::Done) => "over_limit",
            (Some(_), Listing::First | Listing::Further) => "follow",
        }
    }

    /// The objects of a change that this subscriber is to get.
    fn take(&mut self, message: &Message, ids: Option<&[i64]>) -> Vec<Sighted> {
        self.sequence = message.sequence;
        let is_listed = |seen: &&Sighted| self.next.is_none_or(|next| seen.id < next);
        let is_wanted = |seen: &&Sighted| ids.is_none_or(|ids| ids.binary_search(&seen.id).is_ok());
        message.objects.iter().filter(is_listed).filter(is_wanted).copied().collect()
    }

    fn count(&mut self, kind: Kind, objects: usize) {
        self.online = match kind {
            Kind::Online => self.online.saturating_add(objects),
            Kind::Gone => self.online.saturating_sub(objects),
            Kind::Seen => self.online,
        };
    }

    /// Lists further objects once a quarter of those that were asked for is gone, and begins anew with fewer of
    /// them once there are a quarter more.
    fn keep_to(&mut self, limit: usize) {
        let quarter = limit / 4;
        if self.online > limit.saturating_add(quarter) {
            *self = Self::new(self.sequence);
        } else if self.next.is_some() && self.online < limit - quarter {
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
            stage: Stage::Waiting(request.after),
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

    /// Publishes a change by itself.
    fn change(view: &ViewState, kind: Kind, ids: impl IntoIterator<Item = i64>, last_seen: i64) {
        view.apply(kind, ids.into_iter().map(|id| Sighted { id, last_seen }));
        view.flush();
    }

    /// The name, the ids and `remaining` of the next event.
    async fn event(subscription: &mut Subscription) -> (String, Vec<i64>, String) {
        let (event, _) = named_event(subscription).await;
        event
    }

    async fn named_event(subscription: &mut Subscription) -> ((String, Vec<i64>, String), String) {
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
    async fn a_subscriber_too_slow_for_the_ring_is_ended_and_others_go_on() {
        let view = view(0..0).await;
        let (mut slow, mut quick) =
            (subscription(&view, Request::default()), subscription(&view, Request::default()));
        event(&mut slow).await;
        event(&mut quick).await;
        for time in 1..=20_000 {
            change(&view, Kind::Seen, [1], time);
            assert!(quick.next().await.is_some(), "{time}");
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
        let mut places = Vec::new();
        for subscription in &mut subscriptions {
            places.push(subscription.next().await.unwrap().as_ptr());
        }
        assert!(places.iter().all(|place| *place == places[0]));
    }

    // Field case 2.2
    #[tokio::test]
    async fn a_snapshot_comes_in_parts_with_the_changes_between_them() {
        let view = view(0..300).await;
        let mut all = subscription(&view, Request::default());
        assert_eq!(event(&mut all).await, expected("snapshot", 0..128, "follow"));
        // Of what was not listed yet, the list will have it as it is by then.
        change(&view, Kind::Seen, [5, 200], 2);
        change(&view, Kind::Gone, [7, 201], 2);
        assert_eq!(event(&mut all).await, expected("seen", [5], ""));
        assert_eq!(event(&mut all).await, expected("gone", [7], ""));
        let second: Vec<i64> = (128..201).chain(202..257).collect();
        assert_eq!(event(&mut all).await, expected("more", second, "follow"));
        // Not published yet: it is a change after the list.
        view.apply(Kind::Online, std::iter::once(Sighted { id: 1_000, last_seen: 3 }));
        assert_eq!(event(&mut all).await, expected("more", 257..300, "none"));
        view.flush();
        assert_eq!(event(&mut all).await, expected("online", [1_000], ""));
    }

    #[tokio::test]
    async fn each_part_of_a_list_takes_turns_with_other_tasks() {
        let view = view(0..300).await;
        let mut all = subscription(&view, Request::default());
        for _ in 0..3 {
            assert!(all.next().now_or_never().is_none());
            event(&mut all).await;
        }
    }

    #[tokio::test]
    async fn a_snapshot_is_resumed_where_it_was_interrupted() {
        let view = view(-300..0).await;
        let mut first = subscription(&view, Request::default());
        assert_eq!(event(&mut first).await, expected("snapshot", -300..-172, "follow"));
        let (more, name) = named_event(&mut first).await;
        assert_eq!(more, expected("more", -172..-44, "follow"));
        change(&view, Kind::Seen, [-200], 2);
        let after = Some(name);
        let mut second = subscription(&view, Request { after, ..Request::default() });
        assert_eq!(event(&mut second).await, expected("resumed", [], "follow"));
        assert_eq!(event(&mut second).await, expected("seen", [-200], ""));
        let (more, name) = named_event(&mut second).await;
        assert_eq!(more, expected("more", -44..0, "none"));
        assert_eq!(name, view.name(view.last()));
    }

    #[tokio::test]
    async fn with_a_limit_only_the_first_objects_and_their_changes_come() {
        let view = view(0..300).await;
        let mut some = subscription(&view, Request { limit: Some(100), ..Request::default() });
        let (snapshot, name) = named_event(&mut some).await;
        assert_eq!(snapshot, expected("snapshot", 0..100, "over_limit"));
        change(&view, Kind::Seen, 90..200, 2);
        assert_eq!(event(&mut some).await, expected("seen", 90..100, ""));
        // Once a quarter is gone, others take their places.
        change(&view, Kind::Gone, 0..30, 2);
        assert_eq!(event(&mut some).await, expected("gone", 0..30, ""));
        assert_eq!(event(&mut some).await, expected("more", 100..130, "over_limit"));
        // With a quarter more, it begins anew.
        change(&view, Kind::Online, 0..30, 3);
        assert_eq!(event(&mut some).await, expected("online", 0..30, ""));
        assert_eq!(event(&mut some).await, expected("snapshot", 0..100, "over_limit"));

        let request = Request { limit: Some(100), after: Some(name), ..Request::default() };
        let mut resumed = subscription(&view, request);
        assert_eq!(event(&mut resumed).await, expected("resumed", [], "over_limit"));
        assert_eq!(event(&mut resumed).await, expected("seen", 90..100, ""));
        assert_eq!(event(&mut resumed).await, expected("gone", 0..30, ""));
    }

    #[tokio::test]
    async fn a_snapshot_under_the_limit_is_followed_by_all_changes() {
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
    async fn a_heartbeat_names_changes_that_a_subscriber_did_not_get() {
        let view = view(0..0).await;
        let ids = Some(Box::from([2]));
        let mut some = subscription(&view, Request { ids, ..Request::default() });
        event(&mut some).await;
        assert_eq!(some.heartbeat(), STILL_HERE);
        change(&view, Kind::Online, [1], 1);
        assert_eq!(some.step().await, Ok(None));
        let name = format!("id: {}\n\n", view.name(view.last()));
        assert_eq!(some.heartbeat(), name.as_bytes());
        assert_eq!(some.heartbeat(), STILL_HERE);
    }

    #[test]
    fn names_that_make_no_sense_are_not_resumed() {
        for rest in ["-", "1", "1-", "x-1", "1--1", "9223372036854775808-1", "1-1-"] {
            assert_eq!(Cursor::resumed(1, rest, 0, 10), None, "{rest}");
        }
        let negative = Cursor::resumed(1, "-5-3", 0, 10).unwrap();
        assert_eq!((negative.next, negative.online), (Some(-5), 3));
    }
}
