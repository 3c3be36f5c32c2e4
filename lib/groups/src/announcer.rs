//! Which changes of status to announce, and when: an improvement at once, a deterioration only
//! after it has lasted for the group's hold time.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::kind::Status;
use crate::tree::{GroupIndex, Tree};

/// A change of the announced status of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// The group.
    pub group: GroupIndex,
    /// The status that was announced before.
    pub was: Status,
    /// The status that is announced now.
    pub is: Status,
}

/// The announced status of each group of a tree. All times are in microseconds since 1970.
#[derive(Debug)]
pub struct Announcer {
    announced: Vec<(Status, u64)>,
    pending: BTreeMap<GroupIndex, Pending>,
    due: BTreeSet<(u64, GroupIndex)>,
}

/// A status that differs from the announced one.
#[derive(Clone, Copy, Debug)]
struct Pending {
    since: u64,
    due: u64,
    worse: bool,
}

impl Announcer {
    /// Takes the statuses of the tree as announced.
    #[must_use]
    pub fn new(tree: &Tree, now: u64) -> Self {
        let announced = tree.states.iter().map(|state| (state.status, now)).collect();
        Self { announced, pending: BTreeMap::new(), due: BTreeSet::new() }
    }

    /// Continues for a new tree: groups whose path is in both trees keep their announced status and
    /// its time, and a worse status keeps the time since which it has lasted.
    #[must_use]
    pub fn carry_over(tree: &Tree, now: u64, old_tree: &Tree, old: &Self) -> Self {
        let mut announcer = Self::new(tree, now);
        let child = |group: GroupIndex| {
            let parent = old_tree.definition.parents[group.0 as usize];
            ((parent, old_tree.name(group)), group)
        };
        let old_children: HashMap<_, _> = old_tree.groups().map(child).collect();
        let mut old_groups = vec![Some(0); tree.group_count() + 1];
        for group in tree.groups() {
            let parent = tree.definition.parents[group.0 as usize];
            let same = old_groups[parent as usize]
                .and_then(|parent| old_children.get(&(parent, tree.name(group))).copied());
            old_groups[group.0 as usize] = same.map(|same| same.0);
            if let Some(same) = same {
                announcer.announced[group.0 as usize] = old.announced[same.0 as usize];
                let pending = old.pending.get(&same).filter(|pending| pending.worse);
                announcer.note_since(tree, group, pending.map_or(now, |pending| pending.since));
            }
        }
        announcer
    }

    /// Compares the announced statuses of groups with their statuses in the tree. Call it whenever
    /// the tree reports changes, and [`Self::due`] after it.
    pub fn note(&mut self, tree: &Tree, changed: &[GroupIndex], now: u64) {
        for &group in changed {
            self.note_since(tree, group, now);
        }
    }

    /// Does the same for all groups. Call it after [`Tree::set_facts`].
    pub fn note_all(&mut self, tree: &Tree, now: u64) {
        for group in tree.groups() {
            self.note_since(tree, group, now);
        }
    }

    /// Announces what is due: appends the changes, the earliest first.
    pub fn due(&mut self, tree: &Tree, now: u64, out: &mut Vec<Announcement>) {
        while let Some(&(due, group)) = self.due.first()
            && due <= now
        {
            self.due.pop_first();
            self.pending.remove(&group);
            let is = tree.status(group);
            let announced = &mut self.announced[group.0 as usize];
            if announced.0 != is {
                let (was, _) = std::mem::replace(announced, (is, now));
                out.push(Announcement { group, was, is });
            }
        }
    }

    /// When to call [`Self::due`] next, if no status changes before.
    #[must_use]
    pub fn next_due(&self) -> Option<u64> {
        self.due.first().map(|&(due, _)| due)
    }

    /// The announced status of the group, and since when it has been announced.
    #[must_use]
    pub fn announced(&self, group: GroupIndex) -> (Status, u64) {
        self.announced[group.0 as usize]
    }

    /// The status of the group that is not announced yet, and since when it has differed from the
    /// announced one.
    #[must_use]
    pub fn pending(&self, tree: &Tree, group: GroupIndex) -> Option<(Status, u64)> {
        self.pending.get(&group).map(|pending| (tree.status(group), pending.since))
    }

    /// Keeps a worse status pending since its first deterioration, so that a change between two
    /// worse statuses does not restart the hold time.
    fn note_since(&mut self, tree: &Tree, group: GroupIndex, since: u64) {
        let (is, (announced, _)) = (tree.status(group), self.announced[group.0 as usize]);
        let worse = is > announced;
        let pending = self.pending.get(&group).copied();
        if is != announced && pending.is_some_and(|pending| pending.worse == worse) {
            return;
        }
        if let Some(pending) = pending {
            self.pending.remove(&group);
            self.due.remove(&(pending.due, group));
        }
        if is != announced {
            let hold = if worse { tree.rules(group).hold.as_micros() } else { 0 };
            let due = since.saturating_add(u64::try_from(hold).unwrap_or(u64::MAX));
            self.pending.insert(group, Pending { since, due, worse });
            self.due.insert((due, group));
        }
    }
}
