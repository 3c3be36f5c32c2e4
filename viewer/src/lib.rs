//! The read side: which objects are online now, and when each was last seen, over HTTP, with a stream of changes.
//!
//! It keeps in memory what is in the table: from one reading, and from the events. Where events may be lost it
//! reads the table again, so that it is never wrong for long. The write side does not depend on it.

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

/// What the process is called and where its admin address is.
pub const DESCRIPTION: Description = Description {
    name: "viewer",
    about: "Shows who is online, live: a page, an API and a stream of changes",
    admin_address: ":9095",
    drain_delay: "8s",
    reloadable: &[],
};

/// Shows what there is until `shutdown`.
///
/// # Errors
/// When it cannot listen, or a part of it has died.
pub async fn run(
    config: Config,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    Viewer::open(config, &health)?.serve(shutdown).await
}
