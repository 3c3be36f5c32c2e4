//! The objects of a group, which all requests and subscribers of the group share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use axum::http::StatusCode;
use parking_lot::Mutex;
use runtime::problem::Problem;

use super::{Groups, shown};
use crate::api::unavailable;

/// The objects of the groups that are in use.
#[derive(Default)]
pub(crate) struct Members {
    by_path: Mutex<HashMap<String, Entry>>,
    /// The number of definitions that have taken effect.
    definition: AtomicU64,
    /// The number of the viewer's latest change when the current definition took effect.
    defined_at: AtomicU64,
}

struct Entry {
    ids: Weak<[i64]>,
    definition: u64,
}

/// The objects of a group, as of the latest definition that was seen.
pub(crate) struct SharedMembers {
    groups: Arc<Groups>,
    path: String,
    ids: Arc<[i64]>,
    definition: u64,
}

/// How a new definition concerns a group.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Redefined {
    /// It has the same objects.
    Same,
    /// It has other objects.
    Changed,
    /// It no longer exists.
    Removed,
}

impl Members {
    /// Records that a new definition takes effect after this change.
    pub(super) fn redefine(&self, last_change: u64) {
        self.defined_at.store(last_change, Ordering::Relaxed);
        self.definition.fetch_add(1, Ordering::Release);
    }
}

impl Groups {
    /// The objects of a group.
    pub(crate) fn members(self: &Arc<Self>, path: String) -> Result<SharedMembers, Problem> {
        let definition = self.members.definition.load(Ordering::Acquire);
        let ids = self.ids(&path, definition)?;
        Ok(SharedMembers { groups: Arc::clone(self), path, ids, definition })
    }

    /// The ids in ascending order. Returns the same slice for all callers, also after a new
    /// definition if the objects are the same.
    fn ids(&self, path: &str, definition: u64) -> Result<Arc<[i64]>, Problem> {
        let mut by_path = self.members.by_path.lock();
        let known = by_path.get(path).and_then(|entry| Some((entry.ids.upgrade()?, entry)));
        if let Some((ids, entry)) = &known
            && entry.definition == definition
        {
            return Ok(Arc::clone(ids));
        }
        let previous = known.map(|(ids, _)| ids);
        let live = self.live.read();
        let tree = &live.as_ref().ok_or_else(not_ready)?.tree;
        let group = shown::find(tree, path).ok_or_else(|| no_such_group(path))?;
        let ids = tree.objects_of(group);
        drop(live);
        let ids = previous.filter(|previous| **previous == *ids).unwrap_or_else(|| ids.into());
        by_path.retain(|_, entry| entry.ids.strong_count() > 0);
        by_path.insert(path.to_owned(), Entry { ids: Arc::downgrade(&ids), definition });
        Ok(ids)
    }
}

impl SharedMembers {
    /// In ascending order.
    pub(crate) fn ids(&self) -> &[i64] {
        &self.ids
    }

    /// Whether this is the path of the group or of one of its subgroups.
    pub(crate) fn includes(&self, path: &str) -> bool {
        let rest = path.strip_prefix(&self.path);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// Whether the definition has not changed since the change with this number. Otherwise, a
    /// stream that ended with it may have been about other objects.
    pub(crate) fn has_same_definition_since(&self, change: u64) -> bool {
        change > self.groups.members.defined_at.load(Ordering::Relaxed)
    }

    /// Adopts the latest definition.
    pub(crate) fn update(&mut self) -> Redefined {
        let definition = self.groups.members.definition.load(Ordering::Acquire);
        if definition == self.definition {
            return Redefined::Same;
        }
        let Ok(ids) = self.groups.ids(&self.path, definition) else { return Redefined::Removed };
        self.definition = definition;
        let is_same = Arc::ptr_eq(&self.ids, &ids) || self.ids == ids;
        self.ids = ids;
        if is_same { Redefined::Same } else { Redefined::Changed }
    }
}

pub(super) fn no_such_group(path: &str) -> Problem {
    Problem::new(StatusCode::NOT_FOUND, format!("no such group: {path}; see /groups"))
}

pub(super) fn not_ready() -> Problem {
    unavailable("the viewer has not read the table and the history yet".to_owned())
}
