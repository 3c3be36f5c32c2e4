//! A change of a group's status, as the viewers publish it.

use serde::{Deserialize, Serialize};

/// A change of the status of a group of objects. The fields have the names and values of
/// `docs/events.md`; the viewer's stream contains the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupChange {
    /// The names of the group's ancestors and of the group, joined by `/`.
    pub path: String,
    /// The status before: `up`, `degraded` or `down`.
    pub was: String,
    /// The status now.
    pub is: String,
    /// The number of the group's objects that are online.
    pub online: u32,
    /// The number of the group's objects.
    pub total: u32,
    /// What burdens the group most; `None` if it is up.
    pub because: Option<GroupCause>,
}

/// What burdens a group most.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupCause {
    /// The path of the group that contains the cause.
    pub path: String,
    /// The id of the object that is the cause, as text, because many JSON parsers keep only 53 bits
    /// of a number; `None` if the cause is the group as a whole.
    pub object: Option<String>,
    /// The kind of this object, such as `gone`.
    pub kind: Option<String>,
}
