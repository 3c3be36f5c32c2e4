//! What can be checked only when all groups are known.

use twox_hash::XxHash3_64;

use super::names::{quote, short_path};
use super::{BuildError, Maintenance, Subject};
use crate::definition::{MAX_MEMBERSHIPS, Window, index};
use crate::maintenance::Windows;
use crate::rules::Need;
use crate::tree::{GroupIndex, ObjectIndex, Tree};

pub(super) fn check_siblings(tree: &Tree) -> Result<(), BuildError> {
    let mut hashes = Vec::new();
    for parent in 0..index(tree.ends.len()) {
        let children = || tree.children(GroupIndex(parent)).map(|child| (tree.name(child), child));
        // Sorting hashes is faster than sorting names, which is needed only for an error.
        hashes.clear();
        hashes.extend(children().map(|(name, _)| XxHash3_64::oneshot(name.as_bytes())));
        hashes.sort_unstable();
        if !hashes.array_windows().any(|[first, second]| first == second) {
            continue;
        }
        let mut siblings: Vec<_> = children().collect();
        siblings.sort_unstable();
        let repeated = siblings.array_windows().find(|[first, second]| first.0 == second.0);
        if let Some([_, (name, child)]) = repeated {
            let reason = format!("name: {} is the name of a sibling, too", quote(name));
            return Err(error(tree, child.0, reason, Subject::Name(child.0)));
        }
    }
    Ok(())
}

pub(super) fn check_counts(tree: &Tree) -> Result<(), BuildError> {
    let counted = |need| match need {
        Need::Count(count) => count,
        _ => 0,
    };
    if !tree.definition.rules.iter().any(|rules| counted(rules.up).max(counted(rules.degraded)) > 0)
    {
        return Ok(());
    }
    for group in tree.groups() {
        let (rules, weight) = (tree.rules(group), tree.states[group.0 as usize].weight);
        let needs = [
            ("up", rules.up, Subject::Up(group.0)),
            ("degraded", rules.degraded, Subject::Degraded(group.0)),
        ];
        for (field, need, subject) in needs {
            if weight > 0 && counted(need) > weight {
                let reason =
                    format!("{field}: {need} is more than the weight {weight} of the group");
                return Err(error(tree, group.0, reason, subject));
            }
        }
    }
    Ok(())
}

pub(super) fn resolve_maintenance(
    tree: &Tree,
    maintenance: &[Maintenance],
) -> Result<Vec<Window>, BuildError> {
    let ids = tree.object_ids();
    let mut windows = Windows::new(ids.len());
    let mut groups = vec![0; tree.ends.len()];
    let mut examined = 0;
    for (number, maintenance) in maintenance.iter().enumerate() {
        let Maintenance { group, until_micros, objects } = *maintenance;
        let Some((first, last)) = objects else {
            groups[group as usize] = until_micros.max(groups[group as usize]);
            continue;
        };
        let range = ids.partition_point(|&id| id < first)..ids.partition_point(|&id| id <= last);
        examined += range.len() as u64;
        let mut found = false;
        for object in range {
            if tree.contains_object(GroupIndex(group), ObjectIndex(index(object))) {
                windows.extend(object, until_micros);
                found = true;
            }
        }
        if !found || examined > MAX_MEMBERSHIPS {
            let reason = match found {
                true => {
                    format!("maintenance: too many objects; at most {MAX_MEMBERSHIPS} in total")
                }
                false if first == last => {
                    format!("maintenance: object {first} is not in the group")
                }
                false => format!("maintenance: no object of {first}-{last} is in the group"),
            };
            return Err(error(tree, group, reason, Subject::Maintenance(number)));
        }
    }
    for group in 1..groups.len() {
        // A subgroup is in maintenance at least as long as its parent.
        groups[group] = groups[group].max(groups[tree.definition.parents[group] as usize]);
        if groups[group] > 0 {
            for object in tree.definition.members(index(group)).iter().flat_map(|run| run.objects())
            {
                windows.extend(object, groups[group]);
            }
        }
    }
    Ok(windows.finish())
}

fn error(tree: &Tree, group: u32, reason: String, subject: Subject) -> BuildError {
    let path = short_path(group, &tree.definition.parents, |group| tree.definition.name(group));
    BuildError { path, reason, subject }
}
