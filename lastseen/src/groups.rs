//! `lastseen groups`: shows the statuses of groups of objects.

use std::time::Duration;

use anyhow::{Context as _, anyhow};
use groups::{Announcer, Fact, GroupIndex, Tree};
use runtime::CancellationToken;
use runtime::settings::number;
use store::{History, Moment, Objects, StoreError};
use viewer::{Group, GroupsConfig, PATH_NAMES_MAX};

use crate::{print_line, unless_stopped};

/// Rows read at a time.
const PAGE_ROWS: u32 = 10_000;
/// How many paths the error about an unknown path suggests.
const SUGGESTIONS_MAX: usize = 5;
/// The columns after the name are aligned if the names are not longer than this.
const NAME_WIDTH_MAX: usize = 60;
/// The path of a cause with more names than this is shortened.
const CAUSE_NAMES_MAX: usize = 4;

/// Which groups to show.
#[derive(Clone, Debug, clap::Args)]
#[group(skip)]
pub struct Show {
    /// Show this group, such as shop/berlin, and those below it [default: all groups]
    pub path: Option<String>,
    /// How many levels to show; with PATH, how many below that group [default: 2; with PATH: 1]
    #[arg(long, value_parser = number(0..=100_usize))]
    pub depth: Option<usize>,
    /// Print one JSON object per line, with the fields of the viewer's `GET /groups`
    #[arg(long)]
    pub json: bool,
}

/// Prints the groups, each before its subgroups.
///
/// # Errors
/// When the definition of the groups is unusable or has no group with the path, the table or the
/// history cannot be read, the groups cannot be written, or a signal stops the command.
pub(crate) async fn show(
    command: &Show,
    groups: &GroupsConfig,
    store: &store::Config,
    ttl: Duration,
    shutdown: &CancellationToken,
) -> anyhow::Result<()> {
    let tree = unless_stopped(shutdown, groups.read()).await?;
    let mut tree = tree.context("GROUPS_FILE is not set")?;
    if tree.group_count() == 0 {
        eprintln!("GROUPS_FILE defines no group");
        return Ok(());
    }
    let top = command.path.as_deref().map(|path| find(&tree, path)).transpose()?;
    let now = unless_stopped(shutdown, Box::pin(observe(&mut tree, store, ttl))).await?;
    let levels = match (command.depth, top) {
        (Some(levels), Some(_)) => levels,
        (Some(levels), None) => levels.max(1),
        (None, Some(_)) => 1,
        (None, None) => 2,
    };
    if command.json { print_json(&tree, top, levels, now) } else { print_table(&tree, top, levels) }
}

/// Finds the group, or suggests the most similar paths.
fn find(tree: &Tree, path: &str) -> anyhow::Result<GroupIndex> {
    let path = path.trim_matches('/');
    tree.find(path.split('/')).ok_or_else(|| {
        let nearest = nearest(tree, path);
        anyhow!("there is no group {path:?} in GROUPS_FILE; the most similar are: {nearest}")
    })
}

/// The paths most similar to `path` within the last group on it that exists.
fn nearest(tree: &Tree, path: &str) -> String {
    let (mut parent, mut names) = (None, path.split('/').peekable());
    let children = |parent| -> Box<dyn Iterator<Item = GroupIndex>> {
        match parent {
            Some(parent) => Box::new(tree.children(parent)),
            None => Box::new(tree.roots()),
        }
    };
    while let Some(name) = names.peek()
        && let Some(child) = children(parent).find(|&child| tree.name(child) == *name)
    {
        parent = Some(child);
        names.next();
    }
    let name = names.next().unwrap_or_default();
    let difference = |child: GroupIndex| -strsim::jaro_winkler(tree.name(child), name);
    let mut similar: Vec<_> = children(parent).map(|child| (difference(child), child)).collect();
    similar.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    let paths = similar.iter().take(SUGGESTIONS_MAX).map(|&(_, child)| tree.path(child));
    let paths: Vec<_> = paths
        .chain(parent.filter(|_| similar.is_empty()).map(|parent| tree.path(parent)))
        .collect();
    paths.join(", ")
}

/// Sets the facts of all objects from the table and the history, and ends maintenance that is over.
/// Returns the time of the database's clock, in microseconds since 1970.
async fn observe(tree: &mut Tree, config: &store::Config, ttl: Duration) -> anyhow::Result<u64> {
    let mut facts = vec![Fact::NeverSeen; tree.object_ids().len()];
    let mut objects = Objects::open(config).await?;
    let mut after = None;
    loop {
        let page = objects.page(after, PAGE_ROWS).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.id);
        for row in &page {
            if let Some(object) = tree.object(row.id) {
                facts[object.position()] = fact_of(row.age, ttl);
            }
        }
    }
    // After the table, so that an object that is deleted meanwhile counts as gone.
    let history = History::new(config);
    match mark_gone(tree, &history, &mut facts).await {
        Err(error @ StoreError::History(_)) => eprintln!(
            "cannot read the history, so objects that are gone count as never seen: {error}"
        ),
        marked => marked?,
    }
    let now = u64::try_from(history.now().await?.micros()).unwrap_or(0);
    tree.end_maintenance(now, &mut Vec::new());
    tree.set_facts(|object, _| facts[object.position()]);
    Ok(now)
}

/// The fact about an object in the table. An object that is older than the TTL is gone, although it
/// remains in the table while no routine runs.
fn fact_of(age: Duration, ttl: Duration) -> Fact {
    if age > ttl {
        Fact::Gone
    } else if age >= ttl * 2 / 3 {
        Fact::Late
    } else {
        Fact::Online
    }
}

/// Marks the objects that are not in the table, but were once.
async fn mark_gone(tree: &Tree, history: &History, facts: &mut [Fact]) -> Result<(), StoreError> {
    let is_absent = |fact: &Fact| *fact == Fact::NeverSeen;
    let ids = tree.object_ids();
    let Some(last) = facts.iter().rposition(is_absent) else { return Ok(()) };
    let mut first = facts.iter().position(is_absent).map(|first| ids[first]);
    while let Some(from) = first.filter(|&from| from <= ids[last]) {
        let gone = history.gone_since(Moment::from_micros(0), from, PAGE_ROWS).await?;
        for change in &gone {
            if let Some(object) = tree.object(change.id)
                && facts[object.position()] == Fact::NeverSeen
            {
                facts[object.position()] = Fact::Gone;
            }
        }
        first = gone.last().and_then(|last| last.id.checked_add(1));
    }
    Ok(())
}

fn print_json(tree: &Tree, top: Option<GroupIndex>, levels: usize, now: u64) -> anyhow::Result<()> {
    let announcer = Announcer::new(tree, now);
    for (index, depth) in tree.walk(top, levels, None) {
        // As in the viewer's API, a group with a very long path is left out.
        let group = Group::new(tree, &announcer, index, depth.saturating_sub(1));
        anyhow::ensure!(
            group.is_some() || Some(index) != top,
            "the path of this group is longer than 1,024 bytes: --json and the viewer's API do not \
             show it"
        );
        let Some(group) = group else { continue };
        if !print_line(serde_json::to_string(&group)?)? {
            break;
        }
    }
    Ok(())
}

fn print_table(tree: &Tree, top: Option<GroupIndex>, levels: usize) -> anyhow::Result<()> {
    let top_depth = top.map_or(1, |top| tree.depth(top));
    let label = |group, depth: usize| match depth.saturating_sub(top_depth) {
        0 if Some(group) == top => tree.path(group),
        level => format!("{:level$}{:level$}{}", "", "", tree.name(group)),
    };
    let widths =
        tree.walk(top, levels, None).map(|(group, depth)| label(group, depth).chars().count());
    let width = widths.max().unwrap_or(0).clamp("PATH".len(), NAME_WIDTH_MAX);
    let heading = format_args!(
        "{:<width$}  {:<8}  {:>9}  {:>9}  BECAUSE",
        "PATH", "STATUS", "ONLINE", "TOTAL"
    );
    let mut is_open = print_line(heading)?;
    let mut groups = tree.walk(top, levels, None);
    while is_open && let Some((group, depth)) = groups.next() {
        let (view, because) = (tree.view(group), because(tree, group));
        let line = format!(
            "{:<width$}  {:<8}  {:>9}  {:>9}  {because}",
            label(group, depth),
            view.status.name(),
            view.online,
            view.total,
        );
        is_open = print_line(line.trim_end())?;
    }
    Ok(())
}

/// The cause of the group's status, such as `142 gone, berlin`: the object, and the path from the
/// group to the subgroup that contains it.
fn because(tree: &Tree, group: GroupIndex) -> String {
    let Some(because) = tree.because(group, PATH_NAMES_MAX) else { return String::new() };
    let object = because.object.map(|(id, kind)| format!("{id} {}", kind.name().replace('_', " ")));
    let upwards = std::iter::successors(Some(because.group), |&above| tree.parent(above));
    let mut names: Vec<_> =
        upwards.take_while(|&above| above != group).map(|above| tree.name(above)).collect();
    if names.len() > CAUSE_NAMES_MAX {
        names.splice(1..names.len() - CAUSE_NAMES_MAX + 2, ["…"]);
    }
    names.reverse();
    let path = Some(names.join("/")).filter(|path| !path.is_empty());
    [object, path].into_iter().flatten().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use groups::Weights;

    use super::*;

    fn tree(definition: &str) -> Tree {
        groups::parse([("groups.json", definition.as_bytes())], Weights::default()).unwrap()
    }

    #[test]
    fn object_is_late_after_two_thirds_of_the_ttl_and_then_gone() {
        let fact = |age| fact_of(Duration::from_millis(age), Duration::from_secs(30));
        let ages = [0, 19_999, 20_000, 30_000, 30_001];
        assert_eq!(
            ages.map(fact),
            [Fact::Online, Fact::Online, Fact::Late, Fact::Late, Fact::Gone]
        );
    }

    #[test]
    fn unknown_path_suggests_siblings_or_the_group_above() {
        let tree = tree(
            r#"[{"name": "shop", "children": [{"name": "spare"}, {"name": "berlin"}]}, {"name": "x"}]"#,
        );
        for (path, suggestions) in [
            ("shop/berln", "shop/berlin, shop/spare"),
            ("shp", "shop, x"),
            ("shop/spare/x/y", "shop/spare"),
        ] {
            let error = find(&tree, path).unwrap_err().to_string();
            let expected =
                format!("group {path:?} in GROUPS_FILE; the most similar are: {suggestions}");
            assert!(error.ends_with(&expected), "{error}");
        }
        let berlin = find(&tree, "/shop/berlin/").unwrap();
        assert_eq!(tree.path(berlin), "shop/berlin");
    }

    #[test]
    fn long_path_of_a_cause_is_shortened() {
        let mut definition = r#"{"name": "9", "objects": [-7]}"#.to_owned();
        for name in (1..9).rev() {
            definition = format!(r#"{{"name": "{name}", "children": [{definition}]}}"#);
        }
        let tree = tree(&definition);
        let because = |path: &str| because(&tree, tree.find(path.split('/')).unwrap());
        assert_eq!(because("1"), "-7 never seen, 2/3/…/9");
        assert_eq!(because("1/2/3/4/5"), "-7 never seen, 6/7/8/9");
        assert_eq!(because("1/2/3/4/5/6/7/8/9"), "-7 never seen");
    }
}
