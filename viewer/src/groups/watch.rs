//! Watches the files that define the groups, and passes each new definition to the follower, with
//! what the history knows of its objects.

use std::time::{Duration, Instant};

use groups::Tree;
use runtime::Status;
use store::{Change, History, Moment, StoreError};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::loader::{Definition, Loader};
use super::rejection;
use super::source::{self, Observation};

/// Time between two observations. A change takes effect once two observations in a row are equal,
/// because an editor or `git pull` may be halfway through writing.
const INTERVAL: Duration = Duration::from_millis(500);
/// Number of changes in one query of the history.
const PAGE: u32 = 10_000;
/// Maximum difference between the time of a change and those of changes with earlier positions.
const UNSETTLED: Duration = Duration::from_mins(1);
/// 1 while the definition in the files is rejected.
const REFUSED: &str = "lastseen_groups_refused";

/// A message to the follower.
pub(super) enum Message {
    /// A new definition. The follower answers when it follows the objects and has looked them up in
    /// the table: whether it needs the history.
    Define(Box<Tree>, oneshot::Sender<bool>),
    /// These objects are in the history, so they were seen.
    InHistory(Vec<i64>),
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
        Definition { tree, hash }: Definition,
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
            let Some(definition) = self.observe().await else { continue };
            let outcome = definition.as_ref().map(drop).map_err(Clone::clone);
            metrics::gauge!(REFUSED).set(i32::from(outcome.is_err()));
            match definition {
                Ok(None) => {}
                Ok(Some(Definition { tree, hash })) => {
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
    async fn observe(&mut self) -> Option<Result<Option<Definition>, String>> {
        let root = self.loader.file.clone();
        // A panic has been logged.
        let observed = spawn_blocking(move || source::observe(&root)).await.ok()?;
        let is_stable = std::mem::replace(&mut self.previous, observed.clone()) == observed;
        if !is_stable || observed == self.settled {
            return None;
        }
        let (loader, hash) = (self.loader.clone(), self.hash);
        let load = move || {
            let definition = observed.clone().and_then(|files| loader.load(&files, Some(hash)));
            let definition = definition.map_err(|reason| rejection(&loader.file, &reason));
            (source::observe(&loader.file), observed, definition)
        };
        let (after, before, definition) = spawn_blocking(load).await.ok()?;
        if after != before {
            // The files changed while they were read, so the content may be a mixture.
            self.previous = after;
            return None;
        }
        self.settled = before;
        Some(definition)
    }
}

impl Introduction {
    /// Sends the definition, and then the objects that the history has. Reads the history only
    /// after the follower has begun to follow the objects, so that no deletion is missed in
    /// between.
    async fn introduce(&self, tree: Tree) {
        let (sender, needs_history) = oneshot::channel();
        // An error means that the follower was dropped.
        _ = self.follower.send(Message::Define(Box::new(tree), sender)).await;
        let needs_history = needs_history.await.unwrap_or(false);
        if let Some(history) = self.history.as_ref().filter(|_| needs_history) {
            self.read(history).await;
        }
        _ = self.follower.send(Message::TakeEffect).await;
    }

    async fn read(&self, history: &History) {
        let started = Instant::now();
        let mut position = 0;
        let mut delays = messaging::amqp::backoff();
        let mut has_failed = false;
        while let Err(error) = self.read_from(history, &mut position).await {
            if !std::mem::replace(&mut has_failed, true) {
                tracing::warn!(
                    %error, "cannot read the history: new groups take effect once it can be read"
                );
            }
            sleep(delays.next().unwrap_or(INTERVAL)).await;
        }
        tracing::debug!(seconds = started.elapsed().as_secs_f64(), "read the history");
    }

    /// Sends the ids of all changes after `position`, which it advances, so that a call after an
    /// error continues.
    ///
    /// A query for all objects that are gone would be simpler, but it would sort the whole history,
    /// which may have hundreds of millions of changes. It is only used for the latest changes,
    /// which an open transaction may hide from the feed.
    async fn read_from(&self, history: &History, position: &mut i64) -> Result<(), StoreError> {
        let mut since = Moment::from_micros(0);
        loop {
            let page = history.changes_after(*position, PAGE).await?;
            if let Some(last) = page.changes.last() {
                *position = last.position;
                since = last.at.minus(UNSETTLED);
            }
            self.send(&page.changes).await;
            if !page.has_more {
                break;
            }
        }
        let mut first = Some(i64::MIN);
        while let Some(from) = first {
            let gone = history.gone_since(since, from, PAGE).await?;
            let last = gone.last().filter(|_| gone.len() == PAGE as usize);
            first = last.and_then(|last| last.id.checked_add(1));
            self.send(&gone).await;
        }
        Ok(())
    }

    async fn send(&self, changes: &[Change]) {
        let ids = changes.iter().map(|change| change.id).collect();
        // An error means that the follower was dropped.
        _ = self.follower.send(Message::InHistory(ids)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use groups::Weights;
    use testkit::Scratch;

    use super::*;
    use crate::groups::GroupsConfig;

    #[tokio::test]
    async fn change_takes_effect_when_two_observations_are_equal() {
        let scratch = Scratch::new("groups");
        let file = scratch.path().join("groups.json");
        let write = |name: &str| fs::write(&file, format!(r#"{{"name": "{name}"}}"#)).unwrap();
        write("first");
        let loader = Loader::new(&config(&file)).unwrap();
        let observed = source::observe(&file);
        let first = loader.load(&observed.clone().unwrap(), None).unwrap().unwrap();
        let (status, _watched) = watch::channel(Ok(()));
        let (previous, settled) = (observed.clone(), observed);
        let mut files = Files { loader, previous, settled, hash: first.hash, status };
        assert!(files.observe().await.is_none(), "nothing has changed");
        write("second");
        assert!(files.observe().await.is_none(), "the file may change again");
        write("the third");
        assert!(files.observe().await.is_none(), "the file has changed again");
        let definition = files.observe().await.unwrap().unwrap().unwrap();
        assert!(definition.tree.find(["the third"]).is_some());
        assert!(files.observe().await.is_none(), "nothing has changed since");
        // The same content in another file.
        fs::rename(&file, scratch.path().join("old")).unwrap();
        fs::copy(scratch.path().join("old"), &file).unwrap();
        files.hash = definition.hash;
        assert!(files.observe().await.is_none());
        assert!(files.observe().await.unwrap().unwrap().is_none());
        fs::remove_file(&file).unwrap();
        assert!(files.observe().await.is_none(), "the file may come back at once");
        let Some(Err(reason)) = files.observe().await else { panic!("the file is missing") };
        assert!(reason.starts_with("GROUPS_FILE="), "{reason}");
    }

    fn config(file: &std::path::Path) -> GroupsConfig {
        GroupsConfig {
            groups_file: Some(file.to_owned()),
            groups_weights: Weights::default(),
            groups_metrics_depth: 1,
            groups_cache: None::<PathBuf>,
        }
    }
}
