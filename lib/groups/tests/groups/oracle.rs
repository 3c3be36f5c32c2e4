//! The rules of groups, computed anew and recursively: slow, and independent of the crate.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use groups::{Fact, GroupView, Kind, Status};

/// A group as it is defined.
#[derive(Clone, Debug, Default)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) up: String,
    pub(crate) degraded: String,
    pub(crate) hold_micros: u64,
    /// The first and the last id of each entry.
    pub(crate) objects: Vec<(i64, i64)>,
    /// Until when, and which objects; `None` is all of them.
    pub(crate) maintenance: Vec<(u64, Option<i64>)>,
    pub(crate) children: Vec<Group>,
}

/// What the rules depend on.
pub(crate) struct World {
    pub(crate) facts: BTreeMap<i64, Fact>,
    pub(crate) maintained_until: BTreeMap<i64, u64>,
    pub(crate) now: u64,
}

impl World {
    pub(crate) fn kind(&self, id: i64) -> Kind {
        let maintained = self.maintained_until.get(&id).is_some_and(|&until| until > self.now);
        match self.facts.get(&id).copied().unwrap_or_default() {
            Fact::Online => Kind::Online,
            Fact::Late => Kind::Late,
            _ if maintained => Kind::Maintenance,
            Fact::NeverSeen => Kind::NeverSeen,
            Fact::GivenUp => Kind::GivenUp,
            Fact::Gone => Kind::Gone,
        }
    }
}

fn weight(kind: Kind) -> u64 {
    [0, 0, 0, 1, 2, 3][kind as usize]
}

impl Group {
    pub(crate) fn own_ids(&self) -> BTreeSet<i64> {
        self.objects.iter().flat_map(|&(first, last)| first..=last).collect()
    }

    pub(crate) fn all_ids(&self) -> BTreeSet<i64> {
        let mut ids = self.own_ids();
        ids.extend(self.children.iter().flat_map(Self::all_ids));
        ids
    }

    pub(crate) fn view(&self, world: &World) -> GroupView {
        let ids = self.all_ids();
        let mut counts = [0; 6];
        for &id in &ids {
            counts[world.kind(id) as usize] += 1;
        }
        let own = self.own_ids();
        let own_up = own.iter().filter(|&&id| weight(world.kind(id)) == 0).count();
        let (mut total_weight, mut share) = (own.len(), own_up);
        for child in self.children.iter().map(|child| child.view(world)) {
            total_weight += child.weight as usize;
            share += if child.status == Status::Up { child.weight } else { child.share } as usize;
        }
        let status = if total_weight == 0 || share >= need(&self.up, total_weight) {
            Status::Up
        } else if share >= need(&self.degraded, total_weight) {
            Status::Degraded
        } else {
            Status::Down
        };
        GroupView {
            status,
            online: counts[0] + counts[1],
            up: counts[0] + counts[1] + counts[2],
            total: u32::try_from(ids.len()).unwrap(),
            counts,
            weight: u32::try_from(total_weight).unwrap(),
            share: u32::try_from(share).unwrap(),
        }
    }

    /// The path of the cause, its object and its kind.
    pub(crate) fn because(&self, path: &str, world: &World) -> Option<(String, i64, Kind)> {
        if self.view(world).status == Status::Up {
            return None;
        }
        let burden = |group: &Self| {
            group.all_ids().into_iter().map(|id| weight(world.kind(id))).sum::<u64>()
        };
        let mut best: Option<(u64, Result<&Self, i64>)> = None;
        let children = self.children.iter().filter(|child| child.view(world).status != Status::Up);
        let objects = self.own_ids().into_iter().filter(|&id| weight(world.kind(id)) > 0);
        let candidates = children
            .map(|child| (burden(child), Ok(child)))
            .chain(objects.map(|id| (weight(world.kind(id)), Err(id))));
        for candidate in candidates {
            if best.as_ref().is_none_or(|best| candidate.0 > best.0) {
                best = Some(candidate);
            }
        }
        match best?.1 {
            Ok(child) => child.because(&format!("{path}/{}", child.name), world),
            Err(id) => Some((path.to_owned(), id, world.kind(id))),
        }
    }

    pub(crate) fn set_maintenance(&self, maintained_until: &mut BTreeMap<i64, u64>) {
        for &(until, only) in &self.maintenance {
            let ids = only.map_or_else(|| self.all_ids(), |id| BTreeSet::from([id]));
            for id in ids {
                let latest = maintained_until.entry(id).or_default();
                *latest = until.max(*latest);
            }
        }
        for child in &self.children {
            child.set_maintenance(maintained_until);
        }
    }

    /// All groups with their paths, parents before children.
    pub(crate) fn list<'a>(&'a self, parent: &str, out: &mut Vec<(String, &'a Self)>) {
        let path =
            if parent.is_empty() { self.name.clone() } else { format!("{parent}/{}", self.name) };
        out.push((path.clone(), self));
        for child in &self.children {
            child.list(&path, out);
        }
    }

    pub(crate) fn to_json(&self, out: &mut String) {
        // The name is last in some groups, because the order of the fields must not matter.
        let name_first = self.objects.len().is_multiple_of(2);
        let name = format!("\"name\": \"{}\"", self.name);
        let (first, last) =
            if name_first { (name, None) } else { ("\"for\": \"0s\"".into(), Some(name)) };
        let hold = if name_first {
            format!(", \"for\": \"{}us\"", self.hold_micros)
        } else {
            String::new()
        };
        write!(
            out,
            "{{{first}, \"up\": \"{}\", \"degraded\": \"{}\"{hold}",
            self.up, self.degraded
        )
        .unwrap();
        let objects = self.objects.iter().map(|(first, last)| {
            if first == last { first.to_string() } else { format!("\"{first}-{last}\"") }
        });
        write!(out, ",\n\"objects\": [{}]", objects.collect::<Vec<_>>().join(", ")).unwrap();
        let windows = self.maintenance.iter().map(|(until, only)| {
            let objects = only.map_or_else(String::new, |id| format!(", \"objects\": [{id}]"));
            format!("{{\"until\": \"1970-01-01T00:00:00.{until:06}Z\"{objects}}}")
        });
        write!(out, ", \"maintenance\": [{}]", windows.collect::<Vec<_>>().join(", ")).unwrap();
        out.push_str(", \"children\": [");
        for (place, child) in self.children.iter().enumerate() {
            out.push_str(if place > 0 { ", " } else { "" });
            child.to_json(out);
        }
        out.push(']');
        if let Some(name) = last {
            write!(out, ", {name}").unwrap();
        }
        out.push('}');
    }
}

fn need(rule: &str, weight: usize) -> usize {
    match rule {
        "all" => weight,
        "any" => 1,
        _ => match rule.strip_suffix('%') {
            // Written differently from the crate: the least share of which the percentage is
            // enough.
            Some(percent) => {
                let percent: usize = percent.parse().unwrap();
                (0..=weight).find(|share| share * 100 >= percent * weight).unwrap()
            }
            None => rule.parse().unwrap(),
        },
    }
}
