//! The event stream of one subscriber: first a list of the online objects, or the changes that the
//! subscriber missed, and then each change.
//!
//! Decision: docs/decisions/0051-how-does-a-subscriber-follow-the-stream.md

mod cursor;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderName, header};
use bytes::Bytes;
use futures_util::stream;
use runtime::CancellationToken;
use tokio::sync::watch;
use tokio::time::timeout;

use self::cursor::{Cursor, Listing};
use crate::groups::{self, EncodedChange, Redefined, SharedMembers};
use crate::object::{Object, as_f64, encode};
use crate::view_state::{Change, Content, ListRequest, NextItem, TooFarBehind, ViewState};

/// The headers of a stream of server-sent events.
pub(crate) const HEADERS: [(HeaderName, &str); 3] = [
    (header::CONTENT_TYPE, "text/event-stream"),
    // A proxy that compresses the stream may delay events.
    (header::CACHE_CONTROL, "no-store, no-transform"),
    // nginx would buffer events.
    (HeaderName::from_static("x-accel-buffering"), "no"),
];
/// The stream sends a line at least this often, so that each side notices the loss of the other.
pub(crate) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(15);
/// The first block: sets how long browsers wait before they reconnect.
const RETRY_HINT: &[u8] = b"retry: 1000\n\n";
/// An empty comment, which clients ignore.
pub(crate) const HEARTBEAT: &[u8] = b":\n\n";
/// Number of skipped changes after which the stream lets other tasks run.
const SKIPPED_BETWEEN_YIELDS: usize = 64;
/// The last block for a subscriber that reads more slowly than objects change. It asks for a long
/// pause, because reconnecting immediately would not help.
const TOO_SLOW: &[u8] =
    b"retry: 30000\n: too slow to follow all changes; request fewer objects with ?ids= or ?limit=\n\n";

#[derive(Clone, Default)]
pub(crate) struct Subscribers(Arc<AtomicUsize>);

impl Subscribers {
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts a subscriber until the result is dropped.
    pub(crate) fn join(&self) -> CountedSubscriber {
        let now = self.0.fetch_add(1, Ordering::Relaxed) + 1;
        metrics::gauge!("lastseen_viewer_subscribers").set(as_f64(now));
        CountedSubscriber(self.clone())
    }
}

/// A subscriber that counts as connected.
pub(crate) struct CountedSubscriber(Subscribers);

impl Drop for CountedSubscriber {
    fn drop(&mut self) {
        let now = self.0.0.fetch_sub(1, Ordering::Relaxed) - 1;
        metrics::gauge!("lastseen_viewer_subscribers").set(as_f64(now));
    }
}

#[derive(Default)]
pub(crate) struct Request {
    pub(crate) filter: Filter,
    /// Approximate maximum number of listed objects.
    pub(crate) limit: Option<usize>,
    /// Resume after the event with this id, if the ring still has the changes since.
    pub(crate) after: Option<String>,
}

/// What a stream is about.
#[derive(Default)]
pub(crate) enum Filter {
    /// All objects and groups.
    #[default]
    All,
    /// Only these objects, in ascending order, and no groups.
    Ids(Box<[i64]>),
    /// Only the objects of a group, this group and its subgroups.
    Group(SharedMembers),
}

impl Filter {
    fn ids(&self) -> Option<&[i64]> {
        match self {
            Self::All => None,
            Self::Ids(ids) => Some(ids),
            Self::Group(members) => Some(members.ids()),
        }
    }

    fn includes(&self, change: &EncodedChange) -> bool {
        match self {
            Self::All => true,
            Self::Ids(_) => false,
            Self::Group(members) => members.includes(&change.path),
        }
    }
}

/// Builds the body of an event stream, which ends at the shutdown or when the subscriber is too
/// slow.
///
/// A subscription holds only a cursor and at most one event: the ring holds each change once for
/// all subscribers, and the list of objects is read as fast as the subscriber receives it.
pub(crate) fn body(
    view: &Arc<ViewState>,
    subscribers: &Subscribers,
    request: Request,
    shutdown: CancellationToken,
) -> Body {
    let subscription = Subscription::new(view, subscribers, request, shutdown);
    Body::from_stream(stream::unfold(subscription, async |mut subscription| {
        let next = subscription.next().await?;
        Some((Ok::<_, Infallible>(next), subscription))
    }))
}

struct Subscription {
    view: Arc<ViewState>,
    _counted: CountedSubscriber,
    published: watch::Receiver<u64>,
    is_complete: watch::Receiver<bool>,
    filter: Filter,
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

impl Subscription {
    fn new(
        view: &Arc<ViewState>,
        subscribers: &Subscribers,
        request: Request,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            view: Arc::clone(view),
            _counted: subscribers.join(),
            published: view.published(),
            is_complete: view.is_complete(),
            filter: request.filter,
            limit: request.limit,
            stage: Stage::Opening(request.after),
            shutdown,
        }
    }

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
                    let complete = self.is_complete.wait_for(|is_complete| *is_complete);
                    if timeout(HEARTBEAT_INTERVAL, complete).await.is_err() {
                        return Some(Bytes::from_static(HEARTBEAT));
                    }
                    let after = after.take();
                    let (cursor, event) = self.start(after.as_deref());
                    self.stage = Stage::Following(cursor);
                    if event.is_some() {
                        return event;
                    }
                }
                Stage::Following(cursor) => {
                    // Resets `published` before the ring is read, so that a change in between wakes
                    // this subscriber.
                    self.published.borrow_and_update();
                    if let Filter::Group(members) = &mut self.filter {
                        match members.update() {
                            Redefined::Same => {}
                            Redefined::Changed => *cursor = Cursor::new(self.view.last()),
                            Redefined::Removed => return None,
                        }
                    }
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
        let resumed = resumed.filter(|(sequence, _)| match &self.filter {
            Filter::Group(members) => members.has_same_definition_since(*sequence),
            Filter::All | Filter::Ids(_) => true,
        });
        let resumed = resumed.and_then(|(sequence, rest)| {
            Cursor::resume(sequence, rest, self.view.len(), self.limit.unwrap_or(usize::MAX))
        });
        let Some(cursor) = resumed else { return (Cursor::new(self.view.last()), None) };
        let event_id = cursor.event_id(&self.view);
        let event = encode("resumed", &event_id, &[], Some(cursor.remaining()));
        (cursor, Some(event))
    }

    /// The next event, if there is one. Changes come before further objects, so that the list
    /// matches the changes sent so far.
    async fn next_event(&mut self) -> Result<Option<Bytes>, TooFarBehind> {
        let limit = self.limit.unwrap_or(usize::MAX);
        for item in 1_usize.. {
            // Lets other tasks run. Otherwise many subscribers with long lists would delay all
            // other requests.
            if item % SKIPPED_BETWEEN_YIELDS == 0 || self.is_listing() {
                tokio::task::yield_now().await;
            }
            let Stage::Following(cursor) = &mut self.stage else { return Ok(None) };
            let first = cursor.next_id.filter(|_| cursor.listing != Listing::Done);
            let request = first.map(|first| {
                let limit = limit.saturating_sub(cursor.online);
                ListRequest { first, ids: self.filter.ids(), limit }
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
                    let event = encode(event, &event_id, objects, Some(remaining));
                    return Ok(Some(event));
                }
                NextItem::Change(change) => {
                    cursor.sequence = change.sequence;
                    let event = select(&self.view, &self.filter, cursor, &change);
                    if event.is_some() {
                        cursor.sent_sequence = cursor.sequence;
                        cursor.adjust_to_limit(limit);
                        return Ok(event);
                    }
                }
            }
        }
        Ok(None)
    }

    fn is_listing(&self) -> bool {
        matches!(&self.stage, Stage::Following(cursor) if cursor.listing != Listing::Done)
    }

    /// An empty comment, or the latest event id if the stream skipped changes. With the id of an
    /// older event, the subscriber could not resume once the ring has dropped the change after it.
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

/// The part of the change that the subscriber must get, as an event; `None` if there is no such
/// part.
fn select(
    view: &ViewState,
    filter: &Filter,
    cursor: &mut Cursor,
    change: &Change,
) -> Option<Bytes> {
    let is_whole = matches!(filter, Filter::All) && cursor.next_id.is_none();
    match &change.content {
        Content::Objects(kind, objects) if is_whole => {
            cursor.update_online(*kind, objects.len());
            Some(change.encoded.clone())
        }
        Content::Objects(kind, objects) => {
            let objects: Vec<Object> = cursor.select(objects, filter.ids());
            cursor.update_online(*kind, objects.len());
            let event = || encode(kind.name(), &cursor.event_id(view), &objects, None);
            (!objects.is_empty()).then(event)
        }
        Content::Groups(_) if is_whole => Some(change.encoded.clone()),
        Content::Groups(changes) => {
            let mut changes = changes.iter().filter(|change| filter.includes(change)).peekable();
            changes.peek()?;
            Some(groups::encode(&cursor.event_id(view), changes))
        }
    }
}

#[cfg(test)]
mod tests;
