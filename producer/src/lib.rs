//! The front door. It answers a callback only once every id in it is durable, in the broker or in the
//! spool on this disk: never a 2xx for what could still be lost, and never a wait beyond the client's
//! patience of one second.

mod body;
mod callback;
mod config;
mod deadline;
mod duplicate_filter;
mod durable_sink;
mod front_door;
mod rejections;
mod relay;
mod signature;

use service::{CancellationToken, Description, Health};

pub use config::{Callbacks, Config};
pub use front_door::FrontDoor;

/// What the process is called and where its admin address is.
pub const DESCRIPTION: Description = Description {
    name: "producer",
    about: "Takes callbacks on POST /callback and makes a durable message of every object id",
    admin_address: ":9091",
    drain_delay: "8s",
    live: &[],
};

/// Serves callbacks until `shutdown`, then answers those in flight and returns.
///
/// # Errors
/// When it cannot listen, or its publisher or its spool has died.
pub async fn run(
    config: Config,
    health: Health,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    FrontDoor::open(&config, &health).await?.serve(shutdown).await
}
