//! Questions about a tree: lists, causes, weights.

use groups::{Fact, Kind, Status, Weights, WeightsError};

use crate::{SHOP, parse};

#[test]
fn a_spare_group_counts_fully_while_it_is_up_by_its_own_rule() {
    let mut tree = parse(SHOP);
    let [shop, berlin, spare] = tree.groups().collect::<Vec<_>>().try_into().unwrap();
    assert_eq!(tree.view(shop).weight, 103);
    tree.set_facts(|_, id| if id == 8 { Fact::Gone } else { Fact::Online });
    assert_eq!(
        (tree.status(spare), tree.view(shop).share, tree.view(shop).up),
        (Status::Up, 103, 102)
    );
    let mut changed = Vec::new();
    tree.set_fact(tree.object(150).unwrap(), Fact::Gone, &mut changed);
    assert_eq!((changed, tree.status(berlin)), (vec![berlin], Status::Degraded));
    let because = tree.because(berlin, 9).unwrap();
    assert_eq!((because.group, because.object), (berlin, Some((150, Kind::Gone))));
    assert_eq!((tree.because(spare, 9), tree.because(shop, 9)), (None, None));
}

#[test]
fn walk_lists_levels_and_continues_after_a_group() {
    let tree = parse(
        r#"[{"name": "a", "children": [{"name": "b", "children": [{"name": "c"}]}, {"name": "d"}]},
            {"name": "e", "children": [{"name": "f"}]}]"#,
    );
    let walk = |top: &str, levels, after: &str| {
        let find = |path: &str| tree.find(path.split('/'));
        let names = tree.walk(find(top), levels, find(after));
        names
            .flat_map(|(group, depth)| [tree.name(group).to_owned(), depth.to_string()])
            .collect::<String>()
    };
    assert_eq!(walk("", 1, ""), "a1e1");
    assert_eq!(walk("", 2, ""), "a1b2d2e1f2");
    assert_eq!(walk("", 9, ""), "a1b2c3d2e1f2");
    assert_eq!(walk("", 2, "a/b"), "d2e1f2");
    assert_eq!(walk("a", 1, ""), "a1b2d2");
    assert_eq!(walk("a", 2, "a/b/c"), "d2");
    assert_eq!(walk("a/b", 0, ""), "b2");
    assert_eq!(walk("a", 2, "a/d"), "");
}

#[test]
fn weights_are_read_and_invalid_ones_are_explained() {
    let weights: Weights = "late=1, gone=5".parse().unwrap();
    assert_eq!(
        (weights.of(Kind::Late), weights.of(Kind::Gone), weights.of(Kind::GivenUp)),
        (1, 5, 2)
    );
    assert_eq!("".parse(), Ok(Weights::default()));
    assert_eq!("online=1".parse::<Weights>(), Err(WeightsError::Online(1)));
    assert_eq!("gone=1,gone=1".parse::<Weights>(), Err(WeightsError::Repeated("gone")));
    for text in ["lost=1", "gone", "gone=-1", "gone=1001"] {
        assert_eq!(text.parse::<Weights>(), Err(WeightsError::Entry(text.to_owned())));
    }
}

#[test]
fn late_objects_with_a_weight_count_as_not_up() {
    let weights = "late=1".parse().unwrap();
    let json: &[u8] = br#"{"name": "a", "objects": [1]}"#;
    let mut tree = groups::parse([("a", json)], weights).unwrap();
    tree.set_facts(|_, _| Fact::Late);
    let group = tree.roots().next().unwrap();
    let view = tree.view(group);
    assert_eq!((view.status, view.online, view.up), (Status::Down, 1, 0));
    assert_eq!(tree.because(group, usize::MAX).unwrap().object, Some((1, Kind::Late)));
}
