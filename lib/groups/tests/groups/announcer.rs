//! When changes of status are announced.

use groups::{Announcement, Announcer, Fact, Status, Tree};

use crate::parse;

const SECOND: u64 = 1_000_000;

fn set(tree: &mut Tree, announcer: &mut Announcer, fact: Fact, now: u64) -> Vec<(Status, Status)> {
    let mut changed = Vec::new();
    tree.set_fact(tree.object(1).unwrap(), fact, &mut changed);
    announcer.note(tree, &changed, now);
    due(tree, announcer, now)
}

fn due(tree: &Tree, announcer: &mut Announcer, now: u64) -> Vec<(Status, Status)> {
    let mut due = Vec::new();
    announcer.due(tree, now, &mut due);
    due.iter().map(|&Announcement { was, is, .. }| (was, is)).collect()
}

#[test]
fn worse_status_is_announced_after_its_hold_time_better_one_at_once() {
    let mut tree = parse(r#"{"name": "a", "objects": [1], "for": "30s"}"#);
    tree.set_facts(|_, _| Fact::Online);
    let announcer = &mut Announcer::new(&tree, 0);
    let group = tree.roots().next().unwrap();
    assert_eq!(set(&mut tree, announcer, Fact::Gone, 10 * SECOND), []);
    assert_eq!(announcer.next_due(), Some(40 * SECOND));
    assert_eq!(announcer.pending(&tree, group), Some((Status::Down, 10 * SECOND)));
    assert_eq!(set(&mut tree, announcer, Fact::Online, 20 * SECOND), []);
    assert_eq!((announcer.next_due(), announcer.pending(&tree, group)), (None, None));
    assert_eq!(set(&mut tree, announcer, Fact::Gone, 30 * SECOND), []);
    assert_eq!(due(&tree, announcer, 60 * SECOND - 1), []);
    assert_eq!(due(&tree, announcer, 60 * SECOND), [(Status::Up, Status::Down)]);
    assert_eq!(announcer.announced(group), (Status::Down, 60 * SECOND));
    let better = set(&mut tree, announcer, Fact::Online, 61 * SECOND);
    assert_eq!(better, [(Status::Down, Status::Up)]);
}

#[test]
fn new_definition_keeps_announced_statuses_and_pending_times() {
    let definition =
        r#"[{"name": "a", "objects": [1], "for": "30s"}, {"name": "b", "objects": [1]}]"#;
    let mut tree = parse(definition);
    tree.set_facts(|_, _| Fact::Online);
    let announcer = &mut Announcer::new(&tree, 0);
    let worse = set(&mut tree, announcer, Fact::Gone, 10 * SECOND);
    assert_eq!(worse, [(Status::Up, Status::Down)]);

    let mut new = parse(
        r#"[{"name": "new", "objects": [1]}, {"name": "b", "objects": [1], "children": [{"name": "a"}]},
            {"name": "a", "objects": [1], "for": "30s"}]"#,
    );
    new.set_facts(|_, _| Fact::Gone);
    let carried = &mut Announcer::carry_over(&new, 20 * SECOND, &tree, announcer);
    let of = |path: &str| carried.announced(new.find(path.split('/')).unwrap());
    assert_eq!(of("new"), (Status::Down, 20 * SECOND));
    assert_eq!(of("b"), (Status::Down, 10 * SECOND));
    assert_eq!(of("b/a"), (Status::Up, 20 * SECOND));
    assert_eq!(of("a"), (Status::Up, 0));
    assert_eq!(carried.next_due(), Some(40 * SECOND));
    assert_eq!(due(&new, carried, 40 * SECOND), [(Status::Up, Status::Down)]);
}

#[test]
fn all_changes_of_a_new_set_of_facts_are_noted() {
    let mut tree = parse(r#"[{"name": "a", "objects": [1]}, {"name": "b", "objects": [2]}]"#);
    let announcer = &mut Announcer::new(&tree, 0);
    tree.set_facts(|_, _| Fact::Online);
    announcer.note_all(&tree, 1);
    assert_eq!(due(&tree, announcer, 1), [(Status::Down, Status::Up); 2]);
}
