//! Connections of a test to a broker.

use std::time::{Duration, Instant};

use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Channel, Connection, ConnectionProperties};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A broker responds with 0 messages if the leader of a quorum queue does not report the number to
/// it within 250 ms.
const DOUBTFUL_AFTER: Duration = Duration::from_millis(200);

/// The shared broker, from `TEST_AMQP_URI`.
pub fn amqp_uri() -> String {
    std::env::var("TEST_AMQP_URI")
        .expect("TEST_AMQP_URI should be set: run the tests by `make test`, which starts the shared servers and sets it")
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests cannot use messaging::amqp::connect, which they test; a timeout is enough, and a leaked thread ends with the test"
)]
/// Opens a connection.
///
/// # Errors
/// When no broker answers within 5 s.
pub async fn connect(uri: &str) -> Result<Connection, String> {
    let connecting = Connection::connect(uri, ConnectionProperties::default());
    match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(connection) => connection.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no connection within {CONNECT_TIMEOUT:?}")),
    }
}

/// The number of ready messages in a queue, by a passive declaration.
pub(crate) async fn ready_messages(channel: &Channel, queue: &str) -> lapin::Result<u32> {
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    loop {
        let asked = Instant::now();
        let declared = channel.queue_declare(queue.into(), passive, FieldTable::default()).await?;
        let count = declared.message_count();
        if count > 0 || asked.elapsed() < DOUBTFUL_AFTER {
            return Ok(count);
        }
    }
}
