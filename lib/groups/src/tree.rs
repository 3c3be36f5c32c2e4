//! The tree: its groups, its objects, and how to find them.

use crate::definition::{Definition, Run, index};
use crate::kind::{Fact, Kind, Status, Weights};
use crate::lowest_ancestor::LowestAncestor;
use crate::rules::Rules;

/// A group of one tree. Other trees may have fewer groups: a method panics if it gets the index of
/// a group that its tree does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupIndex(pub(crate) u32);

/// An object of one tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectIndex(pub(crate) u32);

impl ObjectIndex {
    /// The position in [`Tree::object_ids`].
    #[must_use]
    pub fn position(self) -> usize {
        self.0 as usize
    }
}

/// The status of a group, and the counts from which it results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupView {
    /// The status, without regard to announcements.
    pub status: Status,
    /// Objects that were seen within their TTL: online and late.
    pub online: u32,
    /// Objects that count as up.
    pub up: u32,
    /// Objects in the group and its subgroups. Each counts once.
    pub total: u32,
    /// The number of objects of each kind, in the order of [`Kind::ALL`].
    pub counts: [u32; 6],
    /// The number of objects, plus the weight of each child group.
    pub weight: u32,
    /// The part of the weight that is up. A child group that is up by its own rule contributes its
    /// whole weight.
    pub share: u32,
}

/// Groups, their objects, and their statuses. A new tree assumes that no object was ever seen, and
/// that each maintenance window is still open.
#[derive(Debug)]
pub struct Tree {
    pub(crate) definition: Definition,
    pub(crate) weights: Weights,
    /// Where the subtree of each group ends.
    pub(crate) ends: Vec<u32>,
    /// The number of ancestors of each group. Stored, because a climb may have a million steps.
    depths: Vec<u32>,
    pub(crate) states: Vec<State>,
    pub(crate) facts: Vec<Fact>,
    pub(crate) in_maintenance: Vec<bool>,
    /// How many windows of `definition.maintenance` have ended.
    pub(crate) ended_windows: usize,
    /// For each object its groups in pre-order, then the lowest common ancestor of each two
    /// successive ones. An object is counted at each of its groups and subtracted at each of these
    /// ancestors, so that each ancestor of its groups counts it once.
    pub(crate) places: Vec<u32>,
    place_ends: Vec<u32>,
}

/// What changes in a group. One such record fits a cache line.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    pub(crate) counts: [u32; 6],
    pub(crate) weight: u32,
    pub(crate) share: u32,
    /// What the group adds to the share of its parent.
    pub(crate) contribution: u32,
    pub(crate) status: Status,
}

impl Tree {
    /// Expects a definition that passes [`Definition::check`].
    pub(crate) fn new(definition: Definition, weights: Weights) -> Self {
        let groups = definition.parents.len();
        let objects = definition.ids.len();
        let mut ends: Vec<u32> = (1..=index(groups)).collect();
        let empty =
            State { counts: [0; 6], weight: 0, share: 0, contribution: 0, status: Status::Up };
        let mut states = vec![empty; groups];
        for group in (0..groups).rev() {
            let members = definition.members(index(group));
            states[group].weight += members.iter().map(|run| run.count).sum::<u32>();
            if group > 0 {
                let parent = definition.parents[group] as usize;
                ends[parent] = ends[parent].max(ends[group]);
                states[parent].weight += states[group].weight;
            }
        }
        let mut depths: Vec<u32> = Vec::with_capacity(groups);
        for &parent in &definition.parents {
            // The parent of group 0, which contains the roots, is the group itself.
            depths.push(depths.get(parent as usize).map_or(0, |above| above + 1));
        }
        let (places, place_ends) = places(&definition);
        let mut tree = Self {
            definition,
            weights,
            ends,
            depths,
            states,
            facts: vec![Fact::NeverSeen; objects],
            in_maintenance: vec![false; objects],
            ended_windows: 0,
            places,
            place_ends,
        };
        tree.open_maintenance();
        tree.compute();
        tree
    }

    /// The number of groups.
    #[must_use]
    pub fn group_count(&self) -> usize {
        self.ends.len() - 1
    }

    /// All groups, parents before children.
    pub fn groups(&self) -> impl DoubleEndedIterator<Item = GroupIndex> + use<> {
        (1..index(self.ends.len())).map(GroupIndex)
    }

    /// The groups without a parent, in the order of the definition.
    pub fn roots(&self) -> impl Iterator<Item = GroupIndex> + '_ {
        self.children(GroupIndex(0))
    }

    /// The child groups, in the order of the definition.
    pub fn children(&self, group: GroupIndex) -> impl Iterator<Item = GroupIndex> + '_ {
        let end = self.end(group);
        let mut next = group.0 + 1;
        std::iter::from_fn(move || {
            let child = (next < end).then_some(GroupIndex(next))?;
            next = self.end(child);
            Some(child)
        })
    }

    /// The parent; `None` for a root.
    #[must_use]
    pub fn parent(&self, group: GroupIndex) -> Option<GroupIndex> {
        Some(self.definition.parents[group.0 as usize]).filter(|&parent| parent > 0).map(GroupIndex)
    }

    /// Whether `other` is the group or below it.
    #[must_use]
    pub fn contains(&self, group: GroupIndex, other: GroupIndex) -> bool {
        (group.0..self.end(group)).contains(&other.0)
    }

    /// Whether the object is in the group or one of its subgroups.
    #[must_use]
    pub fn contains_object(&self, group: GroupIndex, object: ObjectIndex) -> bool {
        let (start, homes, _) = self.place_range(object);
        let homes = &self.places[start..homes];
        let first = homes.partition_point(|&home| home < group.0);
        homes.get(first).is_some_and(|&home| home < self.end(group))
    }

    /// The name of the group.
    #[must_use]
    pub fn name(&self, group: GroupIndex) -> &str {
        self.definition.name(group.0)
    }

    /// The names of the ancestors and of the group, joined by `/`.
    #[must_use]
    pub fn path(&self, group: GroupIndex) -> String {
        let mut names = vec![self.name(group)];
        let ancestors =
            std::iter::successors(self.parent(group), |&ancestor| self.parent(ancestor));
        names.extend(ancestors.map(|ancestor| self.name(ancestor)));
        names.reverse();
        names.join("/")
    }

    /// The number of ancestors and the group itself: 1 for a root.
    #[must_use]
    pub fn depth(&self, group: GroupIndex) -> usize {
        self.depths[group.0 as usize] as usize
    }

    /// Finds a group by the segments of its path. Takes time in proportion to the siblings on the
    /// path.
    pub fn find<'a>(&self, path: impl IntoIterator<Item = &'a str>) -> Option<GroupIndex> {
        let found = path.into_iter().try_fold(GroupIndex(0), |group, name| {
            self.children(group).find(|&child| self.name(child) == name)
        });
        found.filter(|group| group.0 > 0)
    }

    /// Lists groups in pre-order with their depth (1 for roots): `top` and `levels` levels below
    /// it, or the first `levels` levels of the forest without `top`. With `after`, which must be
    /// below `top`, the list continues after that group.
    #[must_use]
    pub fn walk(
        &self,
        top: Option<GroupIndex>,
        levels: usize,
        after: Option<GroupIndex>,
    ) -> Walk<'_> {
        let top_depth = top.map_or(0, |top| self.depth(top));
        let deepest = top_depth.saturating_add(levels);
        let end = self.end(top.unwrap_or(GroupIndex(0)));
        let mut walk = Walk { tree: self, next: 0, depth: 0, deepest, end };
        match (after, top) {
            (Some(after), _) => walk.step_over(after.0, self.depth(after)),
            (None, Some(top)) => (walk.next, walk.depth) = (top.0, top_depth),
            (None, None) => walk.step_over(0, 0),
        }
        walk
    }

    /// The rules of the group.
    #[must_use]
    pub fn rules(&self, group: GroupIndex) -> &Rules {
        let rules = self.definition.rules_of[group.0 as usize];
        &self.definition.rules[rules as usize]
    }

    /// The status of the group and its counts.
    #[must_use]
    pub fn view(&self, group: GroupIndex) -> GroupView {
        let state = &self.states[group.0 as usize];
        GroupView {
            status: state.status,
            online: state.counts[Kind::Online as usize] + state.counts[Kind::Late as usize],
            up: self.weights.up(&state.counts),
            total: state.counts.iter().sum(),
            counts: state.counts,
            weight: state.weight,
            share: state.share,
        }
    }

    /// The status of the group, without regard to announcements.
    #[must_use]
    pub fn status(&self, group: GroupIndex) -> Status {
        self.states[group.0 as usize].status
    }

    /// The ids of all objects: ascending, and each once.
    #[must_use]
    pub fn object_ids(&self) -> &[i64] {
        &self.definition.ids
    }

    /// Finds an object by its id.
    #[must_use]
    pub fn object(&self, id: i64) -> Option<ObjectIndex> {
        self.definition.ids.binary_search(&id).ok().map(|object| ObjectIndex(index(object)))
    }

    /// The id of the object.
    #[must_use]
    pub fn id(&self, object: ObjectIndex) -> i64 {
        self.definition.ids[object.position()]
    }

    /// The last fact of the object.
    #[must_use]
    pub fn fact(&self, object: ObjectIndex) -> Fact {
        self.facts[object.position()]
    }

    /// The kind of the object.
    #[must_use]
    pub fn kind(&self, object: ObjectIndex) -> Kind {
        Kind::of(self.fact(object), self.in_maintenance[object.position()])
    }

    /// The ids of the objects in the group and its subgroups: ascending, and each once.
    #[must_use]
    pub fn objects_of(&self, group: GroupIndex) -> Vec<i64> {
        let start = self.definition.member_ends[group.0 as usize - 1] as usize;
        let end = self.definition.member_ends[self.end(group) as usize - 1] as usize;
        let mut runs: Vec<Run> = self.definition.members[start..end].to_vec();
        runs.sort_unstable_by_key(|run| run.first);
        let mut ids = Vec::with_capacity(self.view(group).total as usize);
        let mut next = 0;
        for run in runs {
            let objects = run.objects();
            ids.extend_from_slice(
                &self.definition.ids[objects.start.max(next)..objects.end.max(next)],
            );
            next = next.max(objects.end);
        }
        ids
    }

    pub(crate) fn end(&self, group: GroupIndex) -> u32 {
        self.ends[group.0 as usize]
    }

    /// Where the groups of the object start in `places`, where the common ancestors start, and
    /// where they end.
    pub(crate) fn place_range(&self, object: ObjectIndex) -> (usize, usize, usize) {
        let object = object.position();
        let start = if object == 0 { 0 } else { self.place_ends[object - 1] as usize };
        let end = self.place_ends[object] as usize;
        (start, start + (end - start).div_ceil(2), end)
    }
}

/// The result of [`Tree::walk`].
#[derive(Debug)]
pub struct Walk<'a> {
    tree: &'a Tree,
    next: u32,
    depth: usize,
    deepest: usize,
    end: u32,
}

impl Walk<'_> {
    /// Moves to the first group after `group`, or after its subtree if its children are too deep.
    fn step_over(&mut self, group: u32, depth: usize) {
        let after = if depth < self.deepest { group + 1 } else { self.tree.ends[group as usize] };
        self.next = after;
        let Some(&parent) = self.tree.definition.parents.get(after as usize) else { return };
        let mut ancestor = group;
        self.depth = depth + 1;
        while ancestor > parent {
            ancestor = self.tree.definition.parents[ancestor as usize];
            self.depth -= 1;
        }
    }
}

impl Iterator for Walk<'_> {
    type Item = (GroupIndex, usize);

    fn next(&mut self) -> Option<Self::Item> {
        let found = (self.next < self.end).then_some((GroupIndex(self.next), self.depth))?;
        self.step_over(self.next, self.depth);
        Some(found)
    }
}

// Decision: docs/decisions/0091-how-are-the-statuses-of-groups-kept-up-to-date.md
/// Returns `places` and `place_ends` of [`Tree`]. Counts the groups of each object first, so that
/// all of them fit one array.
fn places(definition: &Definition) -> (Vec<u32>, Vec<u32>) {
    let groups = index(definition.parents.len());
    let mut ends = vec![0_u32; definition.ids.len()];
    for object in definition.members.iter().flat_map(|run| run.objects()) {
        ends[object] += 1;
    }
    let mut length = 0;
    let mut in_several = false;
    for end in &mut ends {
        let homes = std::mem::replace(end, length);
        in_several |= homes > 1;
        length += (2 * homes).saturating_sub(1);
    }
    let mut places = vec![0; length as usize];
    for group in 0..groups {
        for object in definition.members(group).iter().flat_map(|run| run.objects()) {
            places[ends[object] as usize] = group;
            ends[object] += 1;
        }
    }
    if in_several {
        let lowest = LowestAncestor::new(&definition.parents);
        let mut start = 0;
        for end in &mut ends {
            for home in start + 1..*end as usize {
                places[*end as usize] = lowest.common(places[home - 1], places[home]);
                *end += 1;
            }
            start = *end as usize;
        }
    }
    (places, ends)
}
