//! Tests of the queue and of the events, on a real RabbitMQ and without one. All are in one binary, because each
//! binary takes seconds to link.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod events;
mod nodes;
mod queue;

use std::path::Path;

use lapin::{Channel, Connection};
use testkit::RabbitNode;

/// Opens a channel to the broker at `uri`, and its connection.
async fn channel(uri: &str) -> (Connection, Channel) {
    let connection = testkit::connect(uri).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}

/// Runs scripts/rabbitmq-user, which creates the user `services`, and returns its output.
async fn make_user(node: &RabbitNode, password: &str, queue: &str) -> String {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/rabbitmq-user");
    let environment = [
        ("RABBITMQ_SERVICES_USER", "services"),
        ("RABBITMQ_SERVICES_PASSWORD", password),
        ("QUEUE_NAME", queue),
    ];
    node.run_script(Path::new(script), &environment).await
}
