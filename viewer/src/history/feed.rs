//! The feed of changes as server-sent events: each change once, in the order of the positions,
//! however fast a subscriber reads.
//!
//! Decision: docs/decisions/0088-how-does-the-change-feed-deliver-exactly-once.md

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::stream;
use runtime::CancellationToken;
use store::{ChangePage, History, StoreError};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout_at};

use super::ring::{BLOCK_CHANGES, Block, CHANGES_MAX, Ring};
use crate::stream::{CountedSubscriber, HEARTBEAT, HEARTBEAT_INTERVAL};

/// How often the feed looks for new changes while it has subscribers.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How often a subscriber whose next changes are not in the ring looks for them in the history.
/// They may not be settled yet, or the database may be away.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Number of changes that the feed reads at a time.
const PAGE_CHANGES: usize = CHANGES_MAX / 4;
/// Number of subscribers outside the ring that read the history at the same time. Requests use the
/// other connections.
const CATCHING_UP_MAX: usize = 2;

/// The changes that all subscribers share: while there is a subscriber, one reader adds new changes
/// to the ring.
pub(super) struct Feed {
    history: History,
    /// Each subscriber has a receiver.
    ring: watch::Sender<Ring>,
    subscribed: Notify,
    catching_up: Semaphore,
}

/// Why the changes after a position cannot be read.
pub(super) enum FeedError {
    /// The history no longer has all of them.
    Expired,
    Store(StoreError),
}

impl From<StoreError> for FeedError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Feed {
    pub(super) fn new(history: History) -> Self {
        Self {
            history,
            ring: watch::Sender::default(),
            subscribed: Notify::new(),
            catching_up: Semaphore::new(CATCHING_UP_MAX),
        }
    }

    /// Fills the ring while there are subscribers. Runs until the tokio task is aborted.
    pub(super) async fn run(&self) -> Infallible {
        loop {
            self.subscribed.notified().await;
            while self.ring.receiver_count() > 0 {
                self.follow().await;
            }
            // A subscriber that arrives now reads the history itself until there is a ring again.
            self.ring.send_replace(Ring::default());
        }
    }

    /// Adds each change after the newest one to the ring, until there is no subscriber, or until
    /// the database has been replaced by one that lacks the changes in the ring.
    async fn follow(&self) {
        let mut position = None;
        let mut is_away = false;
        while self.ring.receiver_count() > 0 {
            let outcome = match position {
                None => self.newest().await,
                Some(position) => self.extend(position).await,
            };
            let is_away_now = matches!(outcome, Err(FeedError::Store(_)));
            match outcome {
                Ok((last, has_more)) => {
                    position = Some(last);
                    if has_more {
                        continue;
                    }
                }
                Err(FeedError::Expired) => return,
                Err(FeedError::Store(error)) if !is_away => tracing::warn!(
                    reason = %error,
                    "cannot read the history: the feed of changes waits until it can be read again"
                ),
                Err(FeedError::Store(error)) => {
                    tracing::debug!(reason = %error, "still cannot read the history");
                }
            }
            if is_away && !is_away_now {
                tracing::info!("the feed of changes continues");
            }
            is_away = is_away_now;
            sleep(POLL_INTERVAL).await;
        }
    }

    /// Starts a new ring after the newest change. Returns the position of that change.
    async fn newest(&self) -> Result<(i64, bool), FeedError> {
        // Earlier changes may not be committed yet. The ring does not need them.
        let position = self.history.extent().await?.map_or(0, |extent| extent.last.position);
        self.ring.send_replace(Ring::starting_at(position));
        Ok((position, false))
    }

    /// Adds the next changes to the ring. Returns the position of the last one, and whether more
    /// follow.
    async fn extend(&self, position: i64) -> Result<(i64, bool), FeedError> {
        let page = changes_after(&self.history, position, PAGE_CHANGES).await?;
        let Some(last) = page.changes.last() else { return Ok((position, false)) };
        self.ring.send_modify(|ring| ring.extend(&page.changes));
        Ok((last.position, page.has_more))
    }

    /// A subscription to the changes after `position`.
    pub(super) fn subscribe(
        self: &Arc<Self>,
        position: i64,
        counted: CountedSubscriber,
    ) -> Subscription {
        let ring = self.ring.subscribe();
        self.subscribed.notify_one();
        Subscription { feed: Arc::clone(self), ring, position, is_open: false, _counted: counted }
    }

    /// Reads the next changes after `position`, which the ring does not have.
    async fn catch_up(&self, position: i64) -> Result<Block, FeedError> {
        // The semaphore is never closed.
        let _permit = self.catching_up.acquire().await;
        let page = changes_after(&self.history, position, BLOCK_CHANGES).await?;
        Ok(Block::of(&page.changes))
    }
}

/// A client that follows the feed. It holds a position and at most one block.
pub(super) struct Subscription {
    feed: Arc<Feed>,
    ring: watch::Receiver<Ring>,
    /// The position of the last change that was sent.
    position: i64,
    /// Whether the first block was sent.
    is_open: bool,
    _counted: CountedSubscriber,
}

impl Subscription {
    /// Fails if the history no longer has all changes after the position.
    pub(super) async fn check(&self) -> Result<(), FeedError> {
        let is_in_ring = || self.ring.borrow().covers(self.position);
        if is_in_ring() {
            return Ok(());
        }
        // Unlike other requests, streams wait for their turn here, because browsers reconnect all
        // at once and give up after an error. Meanwhile the ring starts, which saves most checks.
        let _permit = self.feed.catching_up.acquire().await;
        if is_in_ring() {
            return Ok(());
        }
        require_all_after(&self.feed.history, self.position).await
    }

    /// The body of the response, which ends at the shutdown, or when the history no longer has the
    /// next changes.
    pub(super) fn into_body(self, shutdown: CancellationToken) -> Body {
        Body::from_stream(stream::unfold((self, shutdown), async |(mut subscription, shutdown)| {
            let next = shutdown.run_until_cancelled(subscription.next()).await??;
            Some((Ok::<_, Infallible>(next), (subscription, shutdown)))
        }))
    }

    /// The next block of the stream; `None` at its end.
    async fn next(&mut self) -> Option<Bytes> {
        if !std::mem::replace(&mut self.is_open, true) {
            // With the id, a client that reconnects before the first change misses nothing.
            return Some(Bytes::from(format!("retry: 1000\nid: {}\n\n", self.position)));
        }
        let heartbeat_at = Instant::now() + HEARTBEAT_INTERVAL;
        loop {
            let in_ring = self.ring.borrow_and_update().after(self.position);
            let (block, wait_until) = if let Some(block) = in_ring {
                (block, heartbeat_at)
            } else {
                let read = timeout_at(heartbeat_at, self.feed.catch_up(self.position)).await;
                let block = match read {
                    Ok(Ok(block)) => block,
                    Ok(Err(FeedError::Expired)) => return None,
                    // `Feed::follow` logs the outage.
                    Ok(Err(FeedError::Store(_))) | Err(_) => Block::default(),
                };
                (block, heartbeat_at.min(Instant::now() + RETRY_INTERVAL))
            };
            if let Some(last) = block.last {
                self.position = last;
                return Some(block.events);
            }
            // The feed has the sender, so `changed` does not fail.
            let waited = timeout_at(wait_until, self.ring.changed()).await;
            if waited.is_err() && Instant::now() >= heartbeat_at {
                return Some(Bytes::from_static(HEARTBEAT));
            }
        }
    }
}

/// The next changes after `position`, without a gap.
pub(super) async fn changes_after(
    history: &History,
    position: i64,
    limit: usize,
) -> Result<ChangePage, FeedError> {
    let limit = u32::try_from(limit).unwrap_or(u32::MAX);
    let page = history.changes_after(position, limit).await?;
    // Checked after the page was read, because old changes may be deleted at any time.
    let is_next = page.changes.first().is_some_and(|first| first.position - 1 == position);
    if !is_next {
        require_all_after(history, position).await?;
    }
    Ok(page)
}

/// Fails if the history no longer has all changes after `position`.
pub(super) async fn require_all_after(history: &History, position: i64) -> Result<(), FeedError> {
    if history.has_all_after(position).await? { Ok(()) } else { Err(FeedError::Expired) }
}

/// The position of the latest change that the feed can have sent.
pub(super) async fn latest(history: &History) -> Result<i64, FeedError> {
    loop {
        let settled = history.settled().await?;
        if settled > 0 || history.extent().await?.is_none() {
            return Ok(settled);
        }
        // Not known yet, because of a transaction that is open. The caller has a deadline.
        sleep(POLL_INTERVAL).await;
    }
}
