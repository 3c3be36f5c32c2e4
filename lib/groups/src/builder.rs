//! Builds a tree from groups in pre-order, and checks what concerns several groups.

mod checks;
mod names;

use std::collections::HashMap;

use crate::definition::{Definition, MAX_GROUPS, MAX_MEMBERSHIPS, Run, index};
use crate::kind::Weights;
use crate::rules::Rules;
use crate::tree::Tree;
use checks::{check_counts, check_siblings, resolve_maintenance};
use names::{check_name, short_path};
pub(crate) use names::{prefix, quote};

/// A definition is invalid.
#[derive(Debug, thiserror::Error)]
#[error("{}{reason}", prefix(.path))]
pub struct BuildError {
    /// The path of the group, shortened if it is long.
    pub path: String,
    /// The field, and why it is invalid.
    pub reason: String,
    pub(crate) subject: Subject,
}

/// What a [`BuildError`] is about, if that is a call before the failed one. `parse` finds its
/// location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    LastCall,
    Name(u32),
    Up(u32),
    Degraded(u32),
    /// The call of [`Builder::maintenance`] with this number, from 0.
    Maintenance(usize),
}

/// Builds a [`Tree`]. `begin` opens a group below the group that is open, and `end` closes it; the
/// other methods describe the open group.
#[derive(Debug)]
pub struct Builder {
    definition: Definition,
    /// Where the name of each group starts and ends in `definition.names`.
    names: Vec<(u32, u32)>,
    open: u32,
    known_rules: HashMap<Rules, u32>,
    ranges: Vec<Range>,
    memberships: u64,
    maintenance: Vec<Maintenance>,
}

/// The objects of a group from `first` to `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Range {
    group: u32,
    first: i64,
    last: i64,
}

#[derive(Debug)]
struct Maintenance {
    group: u32,
    until_micros: u64,
    objects: Option<(i64, i64)>,
}

impl Default for Builder {
    fn default() -> Self {
        let definition = Definition {
            parents: vec![0],
            rules: vec![Rules::default()],
            rules_of: vec![0],
            ..Definition::default()
        };
        Self {
            definition,
            names: vec![(0, 0)],
            open: 0,
            known_rules: HashMap::new(),
            ranges: Vec::new(),
            memberships: 0,
            maintenance: Vec::new(),
        }
    }
}

impl Builder {
    /// Opens a group with default rules and without a name.
    ///
    /// # Errors
    ///
    /// If there are too many groups.
    pub fn begin(&mut self) -> Result<(), BuildError> {
        let group = index(self.names.len());
        if group > MAX_GROUPS {
            return Err(self.error(format!("too many groups; at most {MAX_GROUPS} are allowed")));
        }
        self.definition.parents.push(self.open);
        self.definition.rules_of.push(0);
        self.names.push((0, 0));
        self.open = group;
        Ok(())
    }

    /// Names the open group.
    ///
    /// # Errors
    ///
    /// If the name is not allowed.
    pub fn name(&mut self, name: &str) -> Result<(), BuildError> {
        self.require_open()?;
        if let Err(reason) = check_name(name) {
            return Err(self.error(format!("name: {reason}, not {}", quote(name))));
        }
        let start = index(self.definition.names.len());
        self.definition.names.push_str(name);
        self.names[self.open as usize] = (start, index(self.definition.names.len()));
        Ok(())
    }

    /// Sets the rules of the open group. A count is checked by [`Self::finish`].
    ///
    /// # Errors
    ///
    /// If no group is open, or a number in a rule is out of its range.
    pub fn rules(&mut self, rules: Rules) -> Result<(), BuildError> {
        self.require_open()?;
        if !rules.up.is_valid() || !rules.degraded.is_valid() {
            return Err(self.error("expected a count of at least 1, and 1% to 100%".to_owned()));
        }
        let known = &mut self.definition.rules;
        let previous = self.definition.rules_of[self.open as usize - 1];
        self.definition.rules_of[self.open as usize] = if rules == known[0] {
            0
        } else if rules == known[previous as usize] {
            previous
        } else {
            *self.known_rules.entry(rules).or_insert_with(|| {
                known.push(rules);
                index(known.len() - 1)
            })
        };
        Ok(())
    }

    /// Adds the objects from `first` to `last`, both included, to the open group.
    ///
    /// # Errors
    ///
    /// If the range is empty, or the tree has too many objects.
    pub fn objects(&mut self, first: i64, last: i64) -> Result<(), BuildError> {
        self.require_open()?;
        if first > last {
            return Err(self.error(format!("objects: {first}-{last} is empty; put {last} first")));
        }
        let count = last.abs_diff(first).saturating_add(1);
        self.memberships = self.memberships.saturating_add(count);
        if self.memberships > MAX_MEMBERSHIPS {
            let reason =
                format!("objects: too many; the groups may list {MAX_MEMBERSHIPS} in total");
            return Err(self.error(reason));
        }
        self.ranges.push(Range { group: self.open, first, last });
        Ok(())
    }

    /// Excuses objects of the open group and its subgroups that are not seen: all of them, or those
    /// from the first to the last id of `objects`. Ids that do not exist do not matter, but
    /// [`Self::finish`] requires one object of the group among them.
    ///
    /// # Errors
    ///
    /// If no group is open.
    pub fn maintenance(
        &mut self,
        until_micros: u64,
        objects: Option<(i64, i64)>,
    ) -> Result<(), BuildError> {
        self.require_open()?;
        self.maintenance.push(Maintenance { group: self.open, until_micros, objects });
        Ok(())
    }

    /// Closes the open group.
    ///
    /// # Errors
    ///
    /// If no group is open, or the group has no name.
    pub fn end(&mut self) -> Result<(), BuildError> {
        self.require_open()?;
        if self.names[self.open as usize] == (0, 0) {
            return Err(self.error("name: missing".to_owned()));
        }
        self.open = self.definition.parents[self.open as usize];
        Ok(())
    }

    /// Builds the tree.
    ///
    /// # Errors
    ///
    /// If a group is still open, siblings have the same name, a rule needs more than the weight of
    /// its group, or the objects of a maintenance window are not in its group.
    pub fn finish(mut self, weights: Weights) -> Result<Tree, BuildError> {
        if self.open != 0 {
            return Err(self.error("the group has no end".to_owned()));
        }
        self.order_names();
        self.resolve_objects();
        let mut tree = Tree::new(std::mem::take(&mut self.definition), weights);
        check_siblings(&tree)?;
        check_counts(&tree)?;
        if !self.maintenance.is_empty() {
            tree.definition.maintenance = resolve_maintenance(&tree, &self.maintenance)?;
            tree.open_maintenance();
            tree.compute();
        }
        Ok(tree)
    }

    /// The path of the open group for an error.
    pub(crate) fn open_path(&self) -> String {
        let name = |group: u32| {
            let (start, end) = self.names[group as usize];
            &self.definition.names[start as usize..end as usize]
        };
        short_path(self.open, &self.definition.parents, name)
    }

    fn require_open(&self) -> Result<(), BuildError> {
        match self.open {
            0 => Err(self.error("no group is open".to_owned())),
            _ => Ok(()),
        }
    }

    fn error(&self, reason: String) -> BuildError {
        BuildError { path: self.open_path(), reason, subject: Subject::LastCall }
    }

    /// Puts the names in the order of the groups. A name that comes after the children is out of
    /// order.
    fn order_names(&mut self) {
        if !self.names.array_windows().all(|[previous, name]| previous.1 == name.0) {
            let mut ordered = String::with_capacity(self.definition.names.len());
            for (start, end) in &mut self.names {
                ordered.push_str(&self.definition.names[*start as usize..*end as usize]);
                *end = index(ordered.len());
            }
            self.definition.names = ordered;
        }
        self.definition.name_ends = self.names.iter().map(|&(_, end)| end).collect();
    }

    /// Merges the ranges of each group, numbers all objects, and converts the ranges to runs.
    fn resolve_objects(&mut self) {
        if !self.ranges.is_sorted() {
            self.ranges.sort_unstable();
        }
        self.ranges.dedup_by(|next, previous| {
            let overlap = next.group == previous.group && next.first <= previous.last;
            if overlap {
                previous.last = previous.last.max(next.last);
            }
            overlap
        });
        self.definition.ids = distinct_ids(&self.ranges);
        let ids = &self.definition.ids;
        let mut next = 0;
        let runs = self.ranges.iter().map(|range| {
            // Often the first object is the one after the previous range.
            let first = match ids.get(next) {
                Some(&id) if id == range.first => next,
                _ => ids.partition_point(|&id| id < range.first),
            };
            let count = usize::try_from(range.last.abs_diff(range.first)).unwrap_or(usize::MAX);
            next = first.saturating_add(count).saturating_add(1);
            Run { first: index(first), count: index(next - first) }
        });
        self.definition.members = runs.collect();
        let mut end = 0;
        let ends = (0..index(self.names.len())).map(|group| {
            end += self.ranges[end..].iter().take_while(|range| range.group == group).count();
            index(end)
        });
        self.definition.member_ends = ends.collect();
    }
}

fn distinct_ids(ranges: &[Range]) -> Vec<i64> {
    let mut ranges: Vec<_> = ranges.iter().map(|range| (range.first, range.last)).collect();
    if !ranges.is_sorted() {
        ranges.sort_unstable();
    }
    let mut ids = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match ids.last() {
            Some(&greatest) if greatest >= last => {}
            Some(&greatest) if greatest >= first => ids.extend(greatest + 1..=last),
            _ => ids.extend(first..=last),
        }
    }
    ids
}
