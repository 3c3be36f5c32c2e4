//! The cause of a group's status.

use crate::kind::Kind;
use crate::tree::{GroupIndex, ObjectIndex, Tree};

/// What burdens a group most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Because {
    /// The group that contains the cause.
    pub group: GroupIndex,
    /// The id and the kind of the object in this group that weighs most, unless the cause is the
    /// group as a whole.
    pub object: Option<(i64, Kind)>,
}

impl Tree {
    /// Descends from a group that is not up to what burdens it most, by at most `levels`; `None` if
    /// the group is up.
    ///
    /// Each step chooses among the child groups that are not up and the group's own objects that do
    /// not count as up, because nothing else lowers the group's share. The greatest burden wins,
    /// then the first child group, then the first object.
    #[must_use]
    pub fn because(&self, group: GroupIndex, levels: usize) -> Option<Because> {
        let mut group = self.is_burdened(group).then_some(group)?;
        let deepest = self.depth(group).saturating_add(levels);
        loop {
            let children = self.children(group).filter(|&child| self.is_burdened(child));
            let heaviest = children.fold(None, |heaviest, child| {
                let burden = self.weights.burden(&self.states[child.0 as usize].counts);
                match heaviest {
                    Some((_, most)) if most >= burden => heaviest,
                    _ => Some((child, burden)),
                }
            });
            let object = self.heaviest_object(group);
            match (heaviest, object) {
                (Some((child, burden)), object)
                    if object.is_none_or(|(_, _, weight)| burden >= u64::from(weight)) =>
                {
                    if self.depth(group) == deepest {
                        return Some(Because { group, object: None });
                    }
                    group = child;
                }
                (_, object) => {
                    let object = object.map(|(id, kind, _)| (id, kind));
                    return Some(Because { group, object });
                }
            }
        }
    }

    fn is_burdened(&self, group: GroupIndex) -> bool {
        self.status(group) != crate::Status::Up
    }

    /// The first of the group's own objects with the greatest weight above 0.
    fn heaviest_object(&self, group: GroupIndex) -> Option<(i64, Kind, u32)> {
        let greatest = Kind::ALL.into_iter().map(|kind| self.weights.of(kind)).max();
        let mut heaviest = None;
        for object in self.definition.members(group.0).iter().flat_map(|run| run.objects()) {
            let kind = self.kind(ObjectIndex(crate::definition::index(object)));
            let weight = self.weights.of(kind);
            if weight > heaviest.map_or(0, |(_, _, weight)| weight) {
                heaviest = Some((self.definition.ids[object], kind, weight));
                if Some(weight) == greatest {
                    break;
                }
            }
        }
        heaviest
    }
}
