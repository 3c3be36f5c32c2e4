//! Times and allocations of the crate `groups`: `cargo bench -p groups`.
//!
//! The three trees have the sizes of the trees of the system that this crate replaces: sessions
//! contain groups, and groups contain tickets, each level spread evenly over the one above.

#![expect(clippy::unwrap_used, reason = "a failed measurement ends the program")]

use std::fmt;

use divan::counter::ItemsCount;
use divan::{AllocProfiler, Bencher, black_box};
use groups::{Builder, Fact, Tree, Weights};

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

fn main() {
    divan::main();
}

/// How many sessions, groups and tickets.
#[derive(Clone, Copy)]
struct Shape(&'static str, usize, usize, usize);

const SHAPES: [Shape; 3] =
    [Shape("small", 1, 3, 12), Shape("middle", 11, 11, 746), Shape("large", 2_020, 349, 361)];
const MILLION: Shape = Shape("million", 10, 1_000, 1_000_000);

impl fmt::Display for Shape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.0)
    }
}

struct Session {
    name: String,
    groups: Vec<(String, Vec<i64>)>,
}

impl Shape {
    fn sessions(self) -> Vec<Session> {
        let Self(_, sessions, groups, tickets) = self;
        let session = |number| Session { name: format!("session {number}"), groups: Vec::new() };
        let mut list: Vec<_> = (0..sessions).map(session).collect();
        let mut sessions_of = Vec::new();
        for group in 0..groups {
            let session = group * sessions / groups;
            sessions_of.push((session, list[session].groups.len()));
            list[session].groups.push((format!("group {group}"), Vec::new()));
        }
        for ticket in 0..tickets {
            let (session, group) = sessions_of[ticket * groups / tickets];
            // Tickets have no consecutive ids.
            list[session].groups[group].1.push(1000 + 7 * i64::try_from(ticket).unwrap());
        }
        list
    }

    fn json(self) -> String {
        let sessions = self.sessions().into_iter().map(|session| {
            let groups = session.groups.iter().map(|(name, tickets)| {
                let tickets: Vec<_> = tickets.iter().map(i64::to_string).collect();
                format!("{{\"name\":\"{name}\",\"objects\":[{}]}}", tickets.join(","))
            });
            let groups: Vec<_> = groups.collect();
            format!("{{\"name\":\"{}\",\"children\":[{}]}}", session.name, groups.join(","))
        });
        format!("[{}]", sessions.collect::<Vec<_>>().join(",\n"))
    }

    fn tree(self) -> Tree {
        build(&self.sessions())
    }
}

fn build(sessions: &[Session]) -> Tree {
    let mut builder = Builder::default();
    for session in sessions {
        builder.begin().unwrap();
        builder.name(&session.name).unwrap();
        for (name, tickets) in &session.groups {
            builder.begin().unwrap();
            builder.name(name).unwrap();
            for &ticket in tickets {
                builder.objects(ticket, ticket).unwrap();
            }
            builder.end().unwrap();
        }
        builder.end().unwrap();
    }
    builder.finish(Weights::default()).unwrap()
}

#[divan::bench(args = SHAPES)]
fn step_1_build(bencher: Bencher<'_, '_>, shape: Shape) {
    let sessions = shape.sessions();
    bencher.bench(|| build(black_box(&sessions)));
}

#[divan::bench(args = SHAPES)]
fn step_2_statuses_of_all_nodes(bencher: Bencher<'_, '_>, shape: Shape) {
    let mut tree = shape.tree();
    tree.set_facts(|_, id| if id % 5 == 0 { Fact::Gone } else { Fact::Online });
    bencher.bench_local(|| black_box(&mut tree).compute());
}

#[divan::bench(args = SHAPES)]
fn step_3_to_binary_with_hash(bencher: Bencher<'_, '_>, shape: Shape) {
    let tree = shape.tree();
    bencher.bench(|| black_box(&tree).to_bytes(1));
}

#[divan::bench(args = SHAPES)]
fn step_4_from_binary(bencher: Bencher<'_, '_>, shape: Shape) {
    let bytes = shape.tree().to_bytes(1);
    bencher.bench(|| Tree::from_bytes(black_box(&bytes), 1, Weights::default()).unwrap());
}

#[divan::bench(args = SHAPES)]
fn step_5_build_from_json(bencher: Bencher<'_, '_>, shape: Shape) {
    let json = shape.json();
    bencher
        .bench(|| groups::parse([("a", black_box(json.as_bytes()))], Weights::default()).unwrap());
}

#[divan::bench]
fn step_6_one_change_among_a_million_leaves(bencher: Bencher<'_, '_>) {
    const CHANGES: usize = 100_000;
    let mut tree = MILLION.tree();
    tree.set_facts(|_, _| Fact::Online);
    let ids = tree.object_ids().to_vec();
    // Each round changes other objects, far from each other.
    let (mut place, mut changed) = (0, Vec::with_capacity(3 * CHANGES));
    bencher.counter(ItemsCount::new(CHANGES)).bench_local(|| {
        changed.clear();
        for _ in 0..CHANGES {
            place = (place + 7_654_321) % ids.len();
            let object = tree.object(ids[place]).unwrap();
            let fact = if tree.fact(object) == Fact::Online { Fact::Gone } else { Fact::Online };
            tree.set_fact(object, fact, &mut changed);
        }
    });
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn step_7_from_binary_with_a_million_leaves(bencher: Bencher<'_, '_>) {
    let bytes = MILLION.tree().to_bytes(1);
    bencher.bench(|| Tree::from_bytes(black_box(&bytes), 1, Weights::default()).unwrap());
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn step_8_build_from_json_with_a_million_leaves(bencher: Bencher<'_, '_>) {
    let json = MILLION.json();
    bencher
        .bench(|| groups::parse([("a", black_box(json.as_bytes()))], Weights::default()).unwrap());
}
