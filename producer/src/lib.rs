//! The producer. It answers 2xx to a callback only once a message for every id is durable, in the
//! broker or in the spool on the local disk. It answers within the second that the client waits.

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

use std::process::ExitCode;

use runtime::{Context, Description};

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

/// The complete `main` of the producer as a process.
#[must_use]
pub fn main() -> ExitCode {
    runtime::main(DESCRIPTION, |config, context| run(config.current(), context))
}

/// Opens the broker that the settings name. Serves callbacks until the shutdown, then answers those
/// in flight and returns.
///
/// # Errors
/// When the producer cannot listen on its address, or cannot open a queue in a file.
pub async fn run(config: Config, context: Context) -> anyhow::Result<()> {
    let Config { callbacks, authenticity, broker } = config;
    let broker = broker.open(&context.supervisor)?;
    CallbackServer::open(callbacks, authenticity, broker, context).await?.serve().await
}
