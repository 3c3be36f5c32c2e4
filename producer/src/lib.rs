//! The producer. It answers 2xx to a callback only once a message for every id is durable, in the
//! broker or in the spool on this disk. It answers within the second that the client waits.

mod body;
mod broker_availability;
mod callback;
mod callback_server;
mod config;
mod deadline;
mod duplicate_filter;
mod durable_sink;
mod rejections;
mod relay;
mod signature;
mod spool_handle;

use service::{CancellationToken, Description, Health};

pub use callback_server::CallbackServer;
pub use config::{Callbacks, Config};

/// The name and the admin address of the process.
pub const DESCRIPTION: Description = Description {
    name: "producer",
    about: "Accepts callbacks on POST /callback and queues a durable message for each object id",
    admin_address: ":9091",
    drain_delay: "8s",
    reloadable: &[],
};

/// Serves callbacks until `shutdown`, then answers those in flight and returns.
///
/// # Errors
/// When it cannot listen, or a publisher stops.
pub async fn run(
    config: Config,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    CallbackServer::open(&config, &health).await?.serve(shutdown).await
}
