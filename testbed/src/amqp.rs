//! Connections of a test to a broker.

use std::time::Duration;

use lapin::{Connection, ConnectionProperties};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The shared broker, from `TEST_AMQP_URI`.
///
/// # Panics
/// When the variable is not set.
#[must_use]
pub fn amqp_uri() -> String {
    std::env::var("TEST_AMQP_URI")
        .expect("TEST_AMQP_URI should be set: run the tests by `make test`, which starts the shared servers and sets it")
}

#[expect(
    clippy::disallowed_methods,
    reason = "amqp::connect is what is tested; here a timeout is enough, and a leaked thread ends with the test"
)]
/// Opens a connection.
///
/// # Errors
/// When there is no broker, or it does not answer within 5 s.
pub async fn connect(uri: &str) -> Result<Connection, String> {
    let connecting = Connection::connect(uri, ConnectionProperties::default());
    match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
        Ok(connection) => connection.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no connection within {CONNECT_TIMEOUT:?}")),
    }
}
