//! The read side: serves over HTTP which objects are online and when each was last seen, with a
//! stream of changes.
//!
//! The viewer keeps a copy of the table in memory. It reads the table once and then applies events.
//! When events may be lost, it reads the table again, so that its copy is soon correct. The write
//! side does not depend on the viewer.

mod api;
mod config;
mod docs;
mod hosts;
mod metrics_scraper;
mod openapi;
mod page;
mod stream;
mod table_sync;
mod view_state;
mod viewer;

use service::{CancellationToken, Description, Health};

pub use config::{Config, View};
pub use hosts::AllowedHost;
pub use viewer::Viewer;

/// The name, help text and default admin address of the process.
pub const DESCRIPTION: Description = Description {
    name: "viewer",
    about: "Shows which objects are online: a live page, an API and a stream of changes",
    admin_address: ":9095",
    drain_delay: "8s",
    reloadable: &[],
};

/// Runs the viewer until `shutdown`.
///
/// # Errors
/// When it cannot listen, or when one of its tasks has ended.
pub async fn run(
    config: Config,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    Viewer::open(config, &health)?.serve(shutdown).await
}
