//! Metrics of groups.

use std::collections::HashMap;

use groups::{Announcement, Announcer, GroupIndex, Status, Tree};
use metrics::{Gauge, gauge};

use super::shown;
use crate::object::as_f64;

/// Number of groups by announced status.
const GROUPS: &str = "lastseen_groups";
/// The announced status of one group.
const GROUP_STATUS: &str = "lastseen_group_status";
/// Maximum number of groups that have had a metric since the start.
const PATHS_MAX: usize = 1_000;

pub(super) struct GroupMetrics {
    depth: usize,
    /// By [`Status`].
    counts: [usize; 3],
    gauges: HashMap<GroupIndex, Gauge>,
    /// The metrics since the start, because a metric cannot be removed.
    by_path: HashMap<String, Gauge>,
}

impl GroupMetrics {
    pub(super) fn new(depth: usize) -> Self {
        metrics::describe_gauge!(GROUPS, "Groups by their announced status.");
        metrics::describe_gauge!(
            GROUP_STATUS,
            "Announced status of a group: 0 up, 1 degraded, 2 down; NaN if it no longer exists."
        );
        let metrics =
            Self { depth, counts: [0; 3], gauges: HashMap::new(), by_path: HashMap::new() };
        metrics.set_counts();
        metrics
    }

    /// Begins anew with the groups of a definition.
    pub(super) fn redefine(&mut self, tree: &Tree, announcer: &Announcer) {
        self.counts = [0; 3];
        for group in tree.groups() {
            self.counts[announcer.announced(group).0 as usize] += 1;
        }
        self.set_counts();
        self.by_path.values().for_each(|gauge| gauge.set(f64::NAN));
        self.gauges.clear();
        let listed = (self.depth > 0).then(|| tree.walk(None, self.depth, None));
        for (group, _) in listed.into_iter().flatten() {
            if self.gauges.len() == PATHS_MAX {
                break;
            }
            let Some(path) = shown::path(tree, group) else { continue };
            let is_full = self.by_path.len() == PATHS_MAX;
            if is_full && !self.by_path.contains_key(&path) {
                continue;
            }
            let gauge = self.by_path.entry(path);
            let gauge =
                gauge.or_insert_with_key(|path| gauge!(GROUP_STATUS, "path" => path.clone()));
            gauge.set(value(announcer.announced(group).0));
            self.gauges.insert(group, gauge.clone());
        }
    }

    pub(super) fn update(&mut self, announcements: &[Announcement]) {
        for Announcement { group, was, is } in announcements {
            self.counts[*was as usize] = self.counts[*was as usize].saturating_sub(1);
            self.counts[*is as usize] += 1;
            if let Some(gauge) = self.gauges.get(group) {
                gauge.set(value(*is));
            }
        }
        self.set_counts();
    }

    fn set_counts(&self) {
        for status in shown::STATUSES {
            gauge!(GROUPS, "status" => status.name()).set(as_f64(self.counts[status as usize]));
        }
    }
}

fn value(status: Status) -> f64 {
    f64::from(status as u8)
}
