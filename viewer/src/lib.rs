//! The read side: serves over HTTP which objects are online and when each was last seen, with a
//! stream of changes.
//!
//! The viewer keeps a copy of the table in memory. It reads the table once and then applies events.
//! When events may be lost, it reads the table again, so that its copy is soon correct. The write
//! side does not depend on the viewer.

mod api;
mod config;
mod history;
mod hosts;
mod metrics_scraper;
mod object;
mod openapi;
mod page;
mod snapshot;
mod stream;
mod table_sync;
mod view_state;
mod viewer;

use std::process::ExitCode;

use runtime::{Context, Description};

pub use config::{Config, View};
pub use hosts::AllowedHost;
pub use viewer::{Resources, Viewer};

/// The name, help text and default admin address of the process.
pub const DESCRIPTION: Description = Description {
    name: "viewer",
    about: "Shows which objects are online: a live page, an API and a stream of changes",
    admin_address: ":9095",
    drain_delay: "8s",
    reloadable: &[],
};

/// The complete `main` of the viewer as a process.
#[must_use]
pub fn main() -> ExitCode {
    runtime::main(DESCRIPTION, |config, context| run(config.current(), context))
}

/// Runs the viewer with the resources that the settings name, until the shutdown.
///
/// # Errors
/// When the viewer cannot listen on `VIEWER_ADDR`.
pub async fn run(config: Config, context: Context) -> anyhow::Result<()> {
    let Config { view, events, store } = config;
    let resources = Resources { store, exchange: events.exchange(), is_pipeline: false };
    Viewer::open(&view, resources, context)?.serve().await
}
