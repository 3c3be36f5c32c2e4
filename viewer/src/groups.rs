//! Groups of objects: reads their definition, derives their statuses from the viewer's copy of the
//! table, announces changes of status, and serves all of it. Without `GROUPS_FILE`, none of it
//! runs.
//!
//! Two tokio tasks share the work. The source ([`watch`]) reads the files and the history. The
//! publisher of changes owns the [`Follower`], which alone changes statuses, so that the changes of
//! groups leave together with those of their objects.

pub(crate) mod api;
mod candidate;
mod config;
mod facts;
mod follower;
mod loader;
mod members;
mod path_metrics;
mod shown;
mod source;
mod watch;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use groups::{Announcer, Tree};
use messaging::events::Emitter;
use parking_lot::{Mutex, RwLock};
use runtime::{Misconfigured, Reloadable, Status};
use store::History;
use tokio::sync::{Notify, mpsc, watch as watch_channel};
use tokio::task::spawn_blocking;

pub use config::GroupsConfig;
pub use shown::{Group, PATH_NAMES_MAX};

pub(crate) use api::router;
pub(crate) use follower::Follower;
pub(crate) use members::{Redefined, SharedMembers};
pub(crate) use shown::{EncodedChange, encode};

use loader::{Definition, Loader};
use members::Members;
use source::Observation;
use watch::Watch;

/// Maximum number of objects that wait to be marked as given up; further ones are dropped.
const GIVEN_UP_MAX: usize = 100_000;

/// The groups as read at the start.
pub struct LoadedGroups {
    loader: Loader,
    files: Observation,
    definition: Definition,
    object_ttl: Reloadable<Duration>,
    metrics_depth: usize,
}

impl GroupsConfig {
    /// Reads `GROUPS_FILE`; `None` if it is not set. `object_ttl` decides when an object is late.
    ///
    /// # Errors
    /// [`Misconfigured`] when the groups cannot be read, or are invalid.
    pub async fn load(
        &self,
        object_ttl: Reloadable<Duration>,
    ) -> anyhow::Result<Option<LoadedGroups>> {
        let Some(loader) = Loader::new(self) else { return Ok(None) };
        let metrics_depth = self.groups_metrics_depth;
        let read = spawn_blocking(move || {
            let files = source::observe(&loader.file);
            let definition = files.clone().and_then(|files| loader.load(&files, None));
            match definition {
                Ok(Some(definition)) => {
                    Ok(Some(LoadedGroups { loader, files, definition, object_ttl, metrics_depth }))
                }
                Ok(None) => Ok(None),
                Err(reason) => Err(rejection(&loader.file, &reason)),
            }
        });
        Ok(read.await.context("reading the groups failed")?.map_err(Misconfigured)?)
    }

    /// Reads `GROUPS_FILE` for a command, without the cache; `None` if it is not set. All objects
    /// of the tree are never seen.
    ///
    /// # Errors
    /// As [`GroupsConfig::load`].
    pub async fn read(&self) -> anyhow::Result<Option<Tree>> {
        let without_cache = Self { groups_cache: None, ..self.clone() };
        let groups = without_cache.load(Reloadable::fixed(Duration::ZERO)).await?;
        Ok(groups.map(|groups| groups.definition.tree))
    }
}

fn rejection(file: &Path, reason: &str) -> String {
    format!("GROUPS_FILE={}: {reason}", file.display())
}

/// The groups and their statuses, which all requests share.
#[derive(Default)]
pub(crate) struct Groups {
    /// `None` until the viewer knows the facts about all objects. Only the [`Follower`] writes it.
    live: RwLock<Option<Live>>,
    members: Members,
    /// Objects that were given up, and that the follower has not marked yet.
    given_up: Mutex<Vec<i64>>,
    given_up_added: Notify,
}

/// The current tree, and the statuses that were announced.
struct Live {
    /// The number of the definition, from 1.
    definition: u64,
    tree: Tree,
    announcer: Announcer,
}

/// The parts of the capability, which the viewer runs.
pub(crate) struct Parts {
    pub(crate) groups: Arc<Groups>,
    pub(crate) follower: Follower,
    pub(crate) watch: Watch,
    /// Whether the current definition is in effect.
    pub(crate) status: watch_channel::Receiver<Status>,
}

impl LoadedGroups {
    /// `history` is `None` if there is none. `emitter` publishes the changes of groups.
    pub(crate) fn into_parts(self, history: Option<History>, emitter: Emitter) -> Parts {
        let Self { loader, files, definition, object_ttl, metrics_depth } = self;
        let groups = Arc::new(Groups::default());
        let (sender, messages) = mpsc::channel(4);
        let (status_sender, status) = watch_channel::channel(Ok(()));
        let follower =
            Follower::new(Arc::clone(&groups), messages, object_ttl, metrics_depth, emitter);
        let watch = Watch::new(loader, files, definition, sender, history, status_sender);
        Parts { groups, follower, watch, status }
    }
}

impl Groups {
    /// Records that the latest messages of these objects became dead letters.
    pub(crate) fn mark_given_up(&self, ids: impl IntoIterator<Item = i64>) {
        let mut waiting = self.given_up.lock();
        let free = GIVEN_UP_MAX.saturating_sub(waiting.len());
        waiting.extend(ids.into_iter().take(free));
        drop(waiting);
        self.given_up_added.notify_one();
    }
}
