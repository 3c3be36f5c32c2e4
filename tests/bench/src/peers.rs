//! The peers: plain programs in other languages that do the same as our services.

use std::path::Path;
use std::process::Command;

use testkit::Process;

use crate::servers::Deployment;

/// Starts the producer in Node. Returns `None` if `NODE_PATH`, which scripts/bench sets if node is
/// installed, names no packages.
pub(crate) fn node_producer(amqp_uri: &str, deployment: &Deployment) -> Option<Process> {
    let packages = std::env::var_os("NODE_PATH")?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("peers/node/producer.cjs");
    let mut command = Command::new("node");
    command
        .arg(script)
        .env("NODE_PATH", packages)
        .env("NODE_ENV", "production")
        .env("AMQP_URI", amqp_uri)
        .env("QUEUE_NAME", &deployment.queue.name);
    Some(Process::spawn_command("node", &mut command))
}
