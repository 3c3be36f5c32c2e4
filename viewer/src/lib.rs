//! The read side: serves over HTTP which objects are online and when each was last seen, with a
//! stream of changes.
//!
//! The viewer keeps a copy of the table in memory. It reads the table once and then applies events.
//! When events may be lost, it reads the table again, so that its copy is soon correct. The write
//! side does not depend on the viewer.

mod api;
mod config;
mod groups;
mod history;
mod hosts;
mod metrics_scraper;
mod object;
mod openapi;
mod page;
mod replace_file;
mod snapshot;
mod stream;
mod table_sync;
mod view_state;
mod viewer;

use std::process::ExitCode;

use runtime::{Context, Description, Reloadable};

pub use crate::groups::{Group, GroupsConfig, LoadedGroups, PATH_NAMES_MAX};
pub use config::{Config, View};
pub use hosts::AllowedHost;
pub use viewer::{Resources, Viewer};

/// The name, help text and default admin address of the process.
pub const DESCRIPTION: Description = Description {
    name: "viewer",
    about: "Shows which objects are online: a live page, an API and a stream of changes",
    admin_address: ":9095",
    drain_delay: "8s",
    reloadable: &[&["OBJECT_TTL"]],
};

/// The complete `main` of the viewer as a process.
#[must_use]
pub fn main() -> ExitCode {
    runtime::main(DESCRIPTION, run)
}

/// Runs the viewer with the resources that the settings name, until the shutdown.
///
/// # Errors
/// When the viewer cannot read the groups, or cannot listen on `VIEWER_ADDR`.
pub async fn run(config: Reloadable<Config>, context: Context) -> anyhow::Result<()> {
    let object_ttl = config.map(|config| config.object_ttl);
    let Config { view, groups, events, store, .. } = config.current();
    let groups = groups.load(object_ttl).await?;
    let resources = Resources { store, exchange: events.exchange(), groups, is_pipeline: false };
    Viewer::open(&view, resources, context)?.serve().await
}
