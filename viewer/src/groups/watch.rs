//! Watches the files that define the groups, and passes each new definition to the follower, with
//! what the history knows of its objects.

use std::time::{Duration, Instant};

use groups::Tree;
use runtime::Status;
use store::{History, Moment, StoreError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::loader::{Loaded, Loader};
use super::rejection;
use super::source::{self, Observation};

/// Time between two observations. A change takes effect once two observations in a row are equal,
/// because an editor or `git pull` may be halfway through writing.
const INTERVAL: Duration = Duration::from_millis(500);
/// Number of objects in one query of the history. After a failure, which may be a timeout, it is
/// divided by [`PAGE_DIVISOR`].
const PAGE_OBJECTS: u32 = 10_000;
const PAGE_OBJECTS_MIN: u32 = 100;
const PAGE_DIVISOR: u32 = 4;
/// 1 while the definition in the files is rejected.
const REFUSED: &str = "lastseen_groups_refused";

/// A message to the follower.
pub(super) enum Message {
    /// A new definition. The follower answers when it follows the objects.
    Define(Box<Tree>, oneshot::Sender<()>),
    /// These objects are gone, according to the history.
    Gone(Vec<i64>),
    /// The history has been read; the definition can take effect.
    TakeEffect,
}

pub(crate) struct Watch {
    files: Files,
    first: Tree,
    introduction: Introduction,
}

/// The files, and what was read of them.
struct Files {
    loader: Loader,
    previous: Observation,
    /// The observation that is in effect or was rejected.
    settled: Observation,
    /// Of the content that is in effect.
    hash: u64,
    status: watch::Sender<Status>,
}

/// What is needed to pass a definition to the follower.
struct Introduction {
    follower: mpsc::Sender<Message>,
    history: Option<History>,
}

impl Watch {
    pub(super) fn new(
        loader: Loader,
        observed: Observation,
        Loaded { tree, hash }: Loaded,
        follower: mpsc::Sender<Message>,
        history: Option<History>,
        status: watch::Sender<Status>,
    ) -> Self {
        metrics::describe_gauge!(
            REFUSED,
            "1 while the definition of the groups is rejected, else 0."
        );
        metrics::gauge!(REFUSED).set(0);
        let files = Files { loader, previous: observed.clone(), settled: observed, hash, status };
        Self { files, first: tree, introduction: Introduction { follower, history } }
    }

    /// Runs until the follower is dropped.
    pub(crate) async fn run(self) {
        let Self { files, first, introduction } = self;
        let (sender, mut trees) = mpsc::channel(1);
        let introduce = async move {
            let mut next = Some(first);
            while let Some(tree) = next {
                next = tokio::select! {
                    // A newer definition replaces one that is not in effect yet.
                    newer = trees.recv() => newer,
                    () = introduction.introduce(tree) => trees.recv().await,
                };
            }
        };
        tokio::join!(files.watch(sender), introduce);
    }
}

impl Files {
    async fn watch(mut self, trees: mpsc::Sender<Tree>) {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Some(loaded) = self.observe().await else { continue };
            let outcome = loaded.as_ref().map(drop).map_err(Clone::clone);
            metrics::gauge!(REFUSED).set(i32::from(outcome.is_err()));
            match loaded {
                Ok(None) => {}
                Ok(Some(Loaded { tree, hash })) => {
                    self.hash = hash;
                    if trees.send(tree).await.is_err() {
                        return;
                    }
                }
                Err(reason) => tracing::error!(
                    reason,
                    "groups rejected; the previous groups stay in effect until they are fixed"
                ),
            }
            _ = self.status.send_replace(outcome);
        }
    }

    /// Loads the definition if the files have changed and two observations were equal.
    async fn observe(&mut self) -> Option<Result<Option<Loaded>, String>> {
        let root = self.loader.file.clone();
        // A panic has been logged.
        let observed = spawn_blocking(move || source::observe(&root)).await.ok()?;
        let is_stable = std::mem::replace(&mut self.previous, observed.clone()) == observed;
        if !is_stable || observed == self.settled {
            return None;
        }
        let (loader, hash) = (self.loader.clone(), self.hash);
        let load = move || {
            let loaded = observed.clone().and_then(|files| loader.load(&files, Some(hash)));
            let loaded = loaded.map_err(|reason| rejection(&loader.file, &reason));
            (source::observe(&loader.file), observed, loaded)
        };
        let (after, before, loaded) = spawn_blocking(load).await.ok()?;
        if after != before {
            // The files changed while they were read, so the content may be a mixture.
            self.previous = after;
            return None;
        }
        self.settled = before;
        Some(loaded)
    }
}

impl Introduction {
    /// Sends the definition, and then all objects that are gone. Reads the history only after the
    /// follower has begun to follow the objects, so that no deletion is missed in between.
    async fn introduce(&self, tree: Tree) {
        let (sender, is_followed) = oneshot::channel();
        // An error means that the follower was dropped.
        _ = self.follower.send(Message::Define(Box::new(tree), sender)).await;
        _ = is_followed.await;
        if let Some(history) = &self.history {
            self.read(history).await;
        }
        _ = self.follower.send(Message::TakeEffect).await;
    }

    async fn read(&self, history: &History) {
        let started = Instant::now();
        let (mut first, mut limit) = (Some(i64::MIN), PAGE_OBJECTS);
        let mut delays = messaging::amqp::backoff();
        let (mut objects, mut has_failed) = (0, false);
        while let Some(from) = first {
            match page(history, from, limit).await {
                Ok(ids) => {
                    let is_last = ids.len() < limit as usize;
                    first = ids.last().filter(|_| !is_last).and_then(|last| last.checked_add(1));
                    objects += ids.len();
                    delays = messaging::amqp::backoff();
                    _ = self.follower.send(Message::Gone(ids)).await;
                }
                Err(error) => {
                    if !std::mem::replace(&mut has_failed, true) {
                        tracing::warn!(
                            %error,
                            "cannot read the history: new groups take effect once it can be read"
                        );
                    }
                    limit = (limit / PAGE_DIVISOR).max(PAGE_OBJECTS_MIN);
                    sleep(delays.next().unwrap_or(INTERVAL)).await;
                }
            }
        }
        let seconds = started.elapsed().as_secs_f64();
        tracing::debug!(objects, seconds, "read from the history which objects are gone");
    }
}

async fn page(history: &History, first: i64, limit: u32) -> Result<Vec<i64>, StoreError> {
    let gone = history.gone_since(Moment::from_micros(0), first, limit).await?;
    Ok(gone.into_iter().map(|change| change.id).collect())
}
