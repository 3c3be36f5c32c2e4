//! Large trees: a million leaves, and a million levels.

use std::fmt::Write as _;

use groups::{Fact, Kind, Status, Tree, Weights};

use crate::parse;

const MILLION: usize = 1_000_000;

#[test]
fn chain_of_a_million_levels_needs_no_deep_stack() {
    let mut json = "{\"name\":\"g\",\"children\":[".repeat(MILLION - 1);
    json.push_str("{\"name\":\"g\",\"objects\":[1]}");
    json.push_str(&"]}".repeat(MILLION - 1));
    let tree = parse(&json);
    let mut tree = Tree::from_bytes(&tree.to_bytes(0), 0, Weights::default()).unwrap();
    let [root, leaf] = [tree.groups().next(), tree.groups().next_back()].map(Option::unwrap);
    assert_eq!(tree.because(root, usize::MAX).unwrap().group, leaf);
    let shallow = tree.because(root, 100).unwrap();
    assert_eq!((tree.depth(shallow.group), shallow.object), (101, None));
    assert_eq!((tree.path(leaf).len(), tree.depth(leaf)), (2 * MILLION - 1, MILLION));
    assert_eq!(tree.find(std::iter::repeat_n("g", MILLION)), Some(leaf));
    assert_eq!(tree.walk(None, MILLION, None).last(), Some((leaf, MILLION)));
    let mut changed = Vec::new();
    tree.set_fact(tree.object(1).unwrap(), Fact::Online, &mut changed);
    assert_eq!((tree.status(root), changed.len()), (Status::Up, MILLION));
    let broken = json.replacen("[1]", "[x]", 1);
    assert!(crate::error(&broken).len() < 200);
}

#[test]
fn a_million_leaves_are_read_computed_and_stored() {
    let mut json = String::from("[");
    for group in 0..1000 {
        let separator = if group > 0 { "," } else { "" };
        write!(json, "{separator}{{\"name\": \"g{group}\", \"objects\": [").unwrap();
        // The ids of a group are not consecutive.
        let ids = (0..1000).map(|object| (object * 1000 + group).to_string());
        write!(json, "{}]}}", ids.collect::<Vec<_>>().join(",")).unwrap();
    }
    json.push(']');
    let tree = parse(&json);
    let mut tree = Tree::from_bytes(&tree.to_bytes(0), 0, Weights::default()).unwrap();
    assert_eq!(tree.object_ids().len(), MILLION);
    tree.set_facts(|_, id| if id == 2_001 { Fact::Gone } else { Fact::Online });
    let group = tree.find(["g1"]).unwrap();
    assert_eq!(tree.view(group).counts, [999, 0, 0, 0, 0, 1]);
    assert_eq!(tree.because(group, usize::MAX).unwrap().object, Some((2_001, Kind::Gone)));
    assert_eq!(tree.groups().filter(|&group| tree.status(group) == Status::Up).count(), 999);
}

#[test]
fn object_in_all_levels_of_two_long_chains_is_updated_in_one_pass() {
    const LEVELS: usize = 50_000;
    let mut builder = groups::Builder::default();
    for root in ["a", "b"] {
        for _ in 0..LEVELS {
            builder.begin().unwrap();
            builder.name(root).unwrap();
            builder.objects(1, 10).unwrap();
        }
        (0..LEVELS).for_each(|_| builder.end().unwrap());
    }
    let mut tree = builder.finish(Weights::default()).unwrap();
    let mut changed = Vec::new();
    for id in 1..=10 {
        tree.set_fact(tree.object(id).unwrap(), Fact::Online, &mut changed);
    }
    for root in tree.roots() {
        let view = tree.view(root);
        assert_eq!((view.total, view.up, view.share), (10, 10, view.weight));
    }
}
