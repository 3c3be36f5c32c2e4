//! How responses and events show groups.

use std::fmt::Write as _;

use bytes::Bytes;
use groups::{Announcement, Announcer, GroupIndex, Kind, Status, Tree};
use messaging::events::{GroupCause, GroupChange};
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::ObjectId;
use crate::object::format_time;

/// A group with a longer path can be neither requested, nor listed, nor announced.
pub(super) const PATH_BYTES_MAX: usize = 1_024;
/// The most names in such a path.
pub const PATH_NAMES_MAX: usize = PATH_BYTES_MAX.div_ceil(2);

/// A group, and its status.
#[derive(Serialize, ToSchema)]
pub struct Group {
    /// The names of the ancestors and of the group, joined by `/`.
    path: String,
    /// The last part of the path.
    name: String,
    /// The number of ancestors: 0 for a root.
    depth: usize,
    /// The status as announced: a worse status is announced once it has lasted for the time `for`.
    #[schema(value_type = GroupStatus)]
    status: &'static str,
    /// Since when the group has had this status, by the database's clock.
    #[schema(value_type = String, format = DateTime)]
    since: String,
    /// The status that is not announced yet; null if there is none.
    pending: Option<PendingStatus>,
    /// Number of objects that are in the table, including those that are late.
    online: u32,
    /// Number of objects that count as up.
    up: u32,
    /// Number of objects in the group and its subgroups.
    total: u32,
    /// The number of objects of each kind.
    counts: Counts,
    /// What weighs most in a group that is not up; null if the group is up.
    because: Option<Cause>,
    /// Number of child groups.
    groups: usize,
    /// How much of the group must be up for the status `up`: `all`, `any`, a number or a
    /// percentage.
    up_rule: String,
    /// How much of the group must be up for the status `degraded`.
    degraded_rule: String,
}

#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "describes the values in the API's description")]
pub(crate) enum GroupStatus {
    Up,
    Degraded,
    Down,
}

#[derive(ToSchema)]
#[schema(rename_all = "snake_case")]
#[expect(dead_code, reason = "describes the values in the API's description")]
pub(crate) enum ObjectKind {
    Online,
    Late,
    Maintenance,
    NeverSeen,
    GivenUp,
    Gone,
}

/// A status that has not lasted long enough to be announced.
#[derive(Serialize, ToSchema)]
pub(crate) struct PendingStatus {
    #[schema(value_type = GroupStatus)]
    status: &'static str,
    /// Since when the status has differed from the announced one.
    #[schema(value_type = String, format = DateTime)]
    since: String,
}

/// The number of objects of each kind.
#[derive(Serialize, ToSchema)]
pub(crate) struct Counts {
    /// Seen within two thirds of `OBJECT_TTL`.
    online: u32,
    /// Seen within `OBJECT_TTL`, but not within two thirds of it.
    late: u32,
    /// In maintenance, and not online.
    maintenance: u32,
    /// Never seen online, as far as the history goes back.
    never_seen: u32,
    /// Their latest message became a dead letter.
    given_up: u32,
    /// Not seen within `OBJECT_TTL`.
    gone: u32,
}

/// What weighs most in a group that is not up.
#[derive(Serialize, ToSchema)]
pub(crate) struct Cause {
    /// The path of the group or subgroup that has the cause; that of the group itself if the other
    /// is longer than 1,024 bytes.
    path: String,
    /// The id of the object in this group that weighs most; null if it is the group as a whole.
    object: Option<ObjectId>,
    /// The kind of the object.
    #[schema(value_type = Option<ObjectKind>)]
    kind: Option<&'static str>,
}

/// A change of the announced status of a group, encoded once for all events.
#[derive(Debug)]
pub(crate) struct EncodedChange {
    pub(crate) path: String,
    pub(crate) json: String,
}

impl Group {
    /// `None` if the path is longer than 1,024 bytes. `depth` is the number of ancestors.
    #[must_use]
    pub fn new(
        tree: &Tree,
        announcer: &Announcer,
        group: GroupIndex,
        depth: usize,
    ) -> Option<Self> {
        let path = path(tree, group)?;
        let (view, rules) = (tree.view(group), tree.rules(group));
        let (status, since) = announcer.announced(group);
        let pending = announcer.pending(tree, group).map(|(status, since)| PendingStatus {
            status: status.name(),
            since: format_micros(since),
        });
        let [online, late, maintenance, never_seen, given_up, gone] = view.counts;
        Some(Self {
            path,
            name: tree.name(group).to_owned(),
            depth,
            status: status.name(),
            since: format_micros(since),
            pending,
            online: view.online,
            up: view.up,
            total: view.total,
            counts: Counts { online, late, maintenance, never_seen, given_up, gone },
            because: Cause::new(tree, group),
            groups: tree.children(group).count(),
            up_rule: rules.up.to_string(),
            degraded_rule: rules.degraded.to_string(),
        })
    }
}

impl Cause {
    fn new(tree: &Tree, group: GroupIndex) -> Option<Self> {
        let because = tree.because(group, PATH_NAMES_MAX)?;
        // The path of the cause begins with that of the group, which is not too long.
        let path = path(tree, because.group).or_else(|| path(tree, group)).unwrap_or_default();
        let (object, kind) = because.object.unzip();
        Some(Self { path, object: object.map(ObjectId), kind: kind.map(Kind::name) })
    }
}

impl EncodedChange {
    pub(super) fn new(change: &GroupChange) -> Option<Self> {
        // It has only texts and numbers, so encoding it does not fail.
        let json = serde_json::to_string(change).ok()?;
        Some(Self { path: change.path.clone(), json })
    }
}

/// The change of a group that events report; `None` if the path is too long.
pub(super) fn change(tree: &Tree, announcement: Announcement) -> Option<GroupChange> {
    let Announcement { group, was, is } = announcement;
    let path = path(tree, group)?;
    let view = tree.view(group);
    let cause = |Cause { path, object, kind }| GroupCause {
        path,
        object: object.map(|object: ObjectId| object.0.to_string()),
        kind: kind.map(str::to_owned),
    };
    Some(GroupChange {
        path,
        was: was.name().to_owned(),
        is: is.name().to_owned(),
        online: view.online,
        total: view.total,
        because: Cause::new(tree, group).map(cause),
    })
}

/// The path, unless it is longer than [`PATH_BYTES_MAX`].
pub(super) fn path(tree: &Tree, group: GroupIndex) -> Option<String> {
    // A chain of groups may have a million levels.
    let may_fit = tree.depth(group) <= PATH_NAMES_MAX;
    may_fit.then(|| tree.path(group)).filter(|path| path.len() <= PATH_BYTES_MAX)
}

/// Finds a group by its path.
pub(super) fn find(tree: &Tree, path: &str) -> Option<GroupIndex> {
    (path.len() <= PATH_BYTES_MAX).then(|| tree.find(path.split('/'))).flatten()
}

/// Encodes the server-sent event `group`.
pub(crate) fn encode<'a>(
    event_id: &str,
    changes: impl Iterator<Item = &'a EncodedChange>,
) -> Bytes {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write!(text, "event: group\nid: {event_id}\ndata: {{\"groups\":[");
    for (index, change) in changes.enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let _ = write!(text, "{comma}{}", change.json);
    }
    text.push_str("]}\n\n");
    text.shrink_to_fit();
    Bytes::from(text)
}

pub(super) const STATUSES: [Status; 3] = [Status::Up, Status::Degraded, Status::Down];

fn format_micros(time: u64) -> String {
    format_time(i64::try_from(time).unwrap_or(i64::MAX))
}
