//! The definition of a tree as flat arrays. The binary form contains exactly these.

use serde::{Deserialize, Serialize};

use crate::rules::Rules;

/// The greatest number of memberships (an object in a group) of a tree.
pub const MAX_MEMBERSHIPS: u64 = 10_000_000;
/// The greatest number of groups of a tree.
pub const MAX_GROUPS: u32 = 4_000_000;

/// Groups are in pre-order. Group 0 has no name and no objects: it is the parent of the roots, so
/// that a forest needs no special case.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Definition {
    /// The parent of each group; less than the group, except for group 0.
    pub(crate) parents: Vec<u32>,
    pub(crate) names: String,
    /// Where the name of each group ends in `names`.
    pub(crate) name_ends: Vec<u32>,
    pub(crate) rules: Vec<Rules>,
    /// The index in `rules` of each group.
    pub(crate) rules_of: Vec<u32>,
    /// The ids of all objects, ascending.
    #[serde(with = "deltas")]
    pub(crate) ids: Vec<i64>,
    /// The objects of each group: disjoint, ascending runs.
    pub(crate) members: Vec<Run>,
    /// Where the runs of each group end in `members`.
    pub(crate) member_ends: Vec<u32>,
    /// The objects in maintenance: disjoint runs, the first to end first.
    pub(crate) maintenance: Vec<Window>,
}

/// Consecutive objects, by their index in [`Definition::ids`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) first: u32,
    pub(crate) count: u32,
}

impl Run {
    pub(crate) fn objects(self) -> std::ops::Range<usize> {
        let first = self.first as usize;
        first..first + self.count as usize
    }
}

/// A run of objects that are in maintenance until a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Window {
    pub(crate) until_micros: u64,
    pub(crate) run: Run,
}

/// Converts the length of an array of a tree. [`MAX_GROUPS`] and [`MAX_MEMBERSHIPS`] keep all of
/// them below `u32::MAX`.
pub(crate) fn index(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

impl Definition {
    pub(crate) fn name(&self, group: u32) -> &str {
        let group = group as usize;
        let start = if group == 0 { 0 } else { self.name_ends[group - 1] };
        &self.names[start as usize..self.name_ends[group] as usize]
    }

    pub(crate) fn members(&self, group: u32) -> &[Run] {
        let group = group as usize;
        let start = if group == 0 { 0 } else { self.member_ends[group - 1] };
        &self.members[start as usize..self.member_ends[group] as usize]
    }

    /// Checks everything that the tree relies on, for a definition that may come from a damaged
    /// file.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        self.check_groups()?;
        self.check_members()?;
        let objects = self.ids.len() as u64;
        let mut in_maintenance = 0;
        for window in &self.maintenance {
            in_maintenance += u64::from(window.run.count);
            if window.run.end() > objects || in_maintenance > objects {
                return Err("a maintenance window contains unknown objects");
            }
        }
        if !self.maintenance.is_sorted_by_key(|window| window.until_micros) {
            return Err("the maintenance windows are not sorted");
        }
        Ok(())
    }

    fn check_groups(&self) -> Result<(), &'static str> {
        let groups = self.parents.len();
        if groups == 0 || groups > MAX_GROUPS as usize + 1 || self.parents[0] != 0 {
            return Err("the number of groups is wrong");
        }
        if self.name_ends.len() != groups || self.rules_of.len() != groups {
            return Err("the arrays of groups have different lengths");
        }
        for group in 1..groups {
            // Climbs from the previous group. A group that this passes has no further subgroups, so
            // the whole loop passes each group once.
            let mut ancestor = index(group - 1);
            while ancestor > self.parents[group] {
                ancestor = self.parents[ancestor as usize];
            }
            if ancestor != self.parents[group] {
                return Err("the groups are not in pre-order");
            }
        }
        let mut start = 0;
        for (group, &end) in self.name_ends.iter().enumerate() {
            let name = self.names.get(start as usize..end as usize);
            if name.is_none_or(|name| name.is_empty() != (group == 0)) {
                return Err("a group has no name");
            }
            start = end;
        }
        if start as usize != self.names.len() {
            return Err("a name has no group");
        }
        let rules = self.rules.len();
        if self.rules_of.iter().any(|&rule| rule as usize >= rules)
            || self.rules.iter().any(|rules| !rules.up.is_valid() || !rules.degraded.is_valid())
        {
            return Err("a rule is invalid");
        }
        Ok(())
    }

    fn check_members(&self) -> Result<(), &'static str> {
        if self.member_ends.len() != self.parents.len()
            || self.member_ends.first() != Some(&0)
            || self.member_ends.last() != Some(&index(self.members.len()))
            || !self.member_ends.is_sorted()
        {
            return Err("the objects of the groups are incomplete");
        }
        let mut memberships = 0;
        for group in 0..index(self.parents.len()) {
            let mut end = 0;
            for run in self.members(group) {
                if run.count == 0 || u64::from(run.first) < end {
                    return Err("the objects of a group are not sorted");
                }
                end = run.end();
                memberships += u64::from(run.count);
            }
            if end > self.ids.len() as u64 || memberships > MAX_MEMBERSHIPS {
                return Err("a group contains too many objects");
            }
        }
        Ok(())
    }
}

impl Run {
    fn end(self) -> u64 {
        u64::from(self.first) + u64::from(self.count)
    }
}

/// Writes ascending ids as differences, because most differences are small and need one byte.
mod deltas {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(ids: &[i64], serializer: S) -> Result<S::Ok, S::Error> {
        let mut previous = i64::MIN;
        serializer.collect_seq(ids.iter().map(|&id| {
            let delta = id.abs_diff(previous);
            previous = id;
            delta
        }))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<i64>, D::Error> {
        let mut previous = None;
        let ids = Vec::<u64>::deserialize(deserializer)?.into_iter().map(|delta| {
            let id = previous.unwrap_or(i64::MIN).checked_add_unsigned(delta);
            let id = id.filter(|&id| previous.is_none_or(|previous| previous < id));
            previous = id;
            id.ok_or_else(|| D::Error::custom("the ids are not ascending"))
        });
        ids.collect()
    }
}
