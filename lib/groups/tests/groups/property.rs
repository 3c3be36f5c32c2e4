//! Incremental updates equal the naive recursive computation.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use groups::{Announcer, Fact, Status, Tree, Weights};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::oracle::{Group, World};
use crate::parse;

const FACTS: [Fact; 5] = [Fact::Online, Fact::Late, Fact::NeverSeen, Fact::GivenUp, Fact::Gone];

/// A group: which earlier group is its parent, its objects, its rules, its hold time, its
/// maintenance.
type Draft = (usize, Vec<(i64, i64)>, (usize, usize), u64, Option<(u64, bool)>);

fn draft() -> impl Strategy<Value = Draft> {
    let objects = vec((-6_i64..9, 0_i64..3), 0..4);
    (
        0_usize..64,
        objects,
        (0_usize..7, 0_usize..7),
        0_u64..6,
        proptest::option::weighted(0.2, (1_u64..20, any::<bool>())),
    )
}

/// Nests the drafts, the last one first, so that each is complete before its parent needs it.
fn forest(drafts: &[Draft]) -> Vec<Group> {
    const RULES: [&str; 7] = ["all", "any", "50%", "67%", "1%", "100%", "1"];
    let mut groups: Vec<Group> = Vec::new();
    for (number, (_, objects, (up, degraded), hold, maintenance)) in drafts.iter().enumerate() {
        let objects: Vec<_> = objects.iter().map(|&(first, more)| (first, first + more)).collect();
        let only = objects.first().map(|&(first, _)| first);
        let maintenance = maintenance.map(|(until, one)| (until, only.filter(|_| one)));
        groups.push(Group {
            name: format!("g{}", number * 7 % 10),
            up: RULES[*up].to_owned(),
            degraded: RULES[*degraded].to_owned(),
            hold_micros: if objects.len() % 2 == 0 { *hold } else { 0 },
            objects,
            maintenance: maintenance.into_iter().collect(),
            children: Vec::new(),
        });
    }
    let mut roots = Vec::new();
    while let Some(group) = groups.pop() {
        match drafts[groups.len()].0 % (groups.len() + 1) {
            0 => roots.push(group),
            parent => groups[parent - 1].children.push(group),
        }
    }
    roots
}

fn check(tree: &Tree, listed: &[(String, &Group)], world: &World) {
    for (group, (path, expected)) in tree.groups().zip(listed) {
        assert_eq!(tree.view(group), expected.view(world), "{path}");
        let because = tree.because(group, usize::MAX).map(|because| {
            let (id, kind) = because.object.unwrap();
            (tree.path(because.group), id, kind)
        });
        assert_eq!(because, expected.because(path, world), "{path}");
    }
}

/// The announced status of each group, and since when a worse one has lasted.
type NaiveAnnouncer = Vec<(Status, Option<u64>)>;

fn announce(
    naive: &mut NaiveAnnouncer,
    statuses: &[Status],
    listed: &[(String, &Group)],
    now: u64,
) -> BTreeSet<(usize, Status, Status)> {
    let mut announcements = BTreeSet::new();
    for (number, (announced, worse_since)) in naive.iter_mut().enumerate() {
        let is = statuses[number];
        if is > *announced {
            let since = *worse_since.get_or_insert(now);
            if now < since + listed[number].1.hold_micros {
                continue;
            }
        }
        *worse_since = None;
        if is != *announced {
            announcements.insert((number, *announced, is));
            *announced = is;
        }
    }
    announcements
}

fn statuses(tree: &Tree) -> Vec<Status> {
    tree.groups().map(|group| tree.status(group)).collect()
}

fn play(drafts: &[Draft], steps: &[(usize, usize, u64)]) {
    let roots = forest(drafts);
    let mut documents = Vec::new();
    let mut listed = Vec::new();
    let mut world = World { facts: BTreeMap::new(), maintained_until: BTreeMap::new(), now: 0 };
    for root in &roots {
        let mut json = String::new();
        root.to_json(&mut json);
        documents.push(json);
        root.list("", &mut listed);
        root.set_maintenance(&mut world.maintained_until);
    }
    let mut tree = parse(&format!("[{}]", documents.join(",\n")));
    check_structure(&tree, &listed);
    check(&tree, &listed, &world);
    let mut announcer = Announcer::new(&tree, 0);
    let mut naive: NaiveAnnouncer = statuses(&tree).into_iter().map(|is| (is, None)).collect();
    for &(object, fact, time) in steps {
        let before = statuses(&tree);
        let mut changed = Vec::new();
        world.now += time;
        tree.end_maintenance(world.now, &mut changed);
        if !tree.object_ids().is_empty() {
            let id = tree.object_ids()[object % tree.object_ids().len()];
            world.facts.insert(id, FACTS[fact]);
            tree.set_fact(tree.object(id).unwrap(), FACTS[fact], &mut changed);
        }
        check(&tree, &listed, &world);
        let after = statuses(&tree);
        for (number, group) in tree.groups().enumerate() {
            assert!(before[number] == after[number] || changed.contains(&group));
        }
        announcer.note(&tree, &changed, world.now);
        let mut due = Vec::new();
        announcer.due(&tree, world.now, &mut due);
        let number = |due| tree.groups().position(|group| group == due).unwrap();
        let due = due.iter().map(|due| (number(due.group), due.was, due.is));
        let due = due.collect::<BTreeSet<_>>();
        assert_eq!(due, announce(&mut naive, &after, &listed, world.now));
    }
    let mut other = Tree::from_bytes(&tree.to_bytes(1), 1, Weights::default()).unwrap();
    other.end_maintenance(world.now, &mut Vec::new());
    assert_eq!(other.next_maintenance_end(), tree.next_maintenance_end());
    other.set_facts(|_, id| world.facts.get(&id).copied().unwrap_or_default());
    check(&other, &listed, &world);
}

fn check_structure(tree: &Tree, listed: &[(String, &Group)]) {
    assert_eq!(tree.group_count(), listed.len());
    for (group, (path, expected)) in tree.groups().zip(listed) {
        assert_eq!(&tree.path(group), path);
        assert_eq!(tree.find(path.split('/')), Some(group));
        let ids = expected.all_ids();
        assert_eq!(tree.rules(group).hold, Duration::from_micros(expected.hold_micros));
        for object in tree.object_ids().iter().map(|&id| tree.object(id).unwrap()) {
            assert_eq!(tree.contains_object(group, object), ids.contains(&tree.id(object)));
        }
        assert_eq!(tree.objects_of(group), Vec::from_iter(ids));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn incremental_updates_equal_a_naive_computation(
        drafts in vec(draft(), 0..8),
        steps in vec((0_usize..32, 0_usize..5, 0_u64..4), 0..8),
    ) {
        play(&drafts, &steps);
    }
}
