//! Groups of objects: sites, customers, lines. A [`Tree`] is defined by JSON ([`parse()`]) or by a
//! [`Builder`]. It derives the status of each group from its objects and subgroups, and a change of
//! an object touches only the groups that contain the object. An [`Announcer`] decides which
//! changes of status to announce, and when.
//!
//! The tree is a set of flat arrays in pre-order, so no operation is recursive and a chain of a
//! million levels needs no deep stack. This crate does no I/O and has no clock.

mod announcer;
mod because;
mod binary;
mod builder;
mod definition;
mod kind;
mod lowest_ancestor;
mod maintenance;
mod parse;
mod rules;
mod status;
mod tree;

pub use announcer::{Announcement, Announcer};
pub use because::Because;
pub use binary::{BinaryError, source_hash};
pub use builder::{BuildError, Builder};
pub use definition::{MAX_GROUPS, MAX_MEMBERSHIPS};
pub use kind::{Fact, Kind, Status, Weights, WeightsError};
pub use parse::{DefinitionError, parse};
pub use rules::{Need, Rules};
pub use tree::{GroupIndex, GroupView, ObjectIndex, Tree, Walk};
