//! Connections to RabbitMQ, but nothing that is sent over them: the URI, trusted authorities,
//! opening a connection with a deadline for each step, and the backoff between attempts.

mod link;
pub mod settings;
mod uri;

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

pub use link::{ConnectError, Link, OutageLog, RPC_TIMEOUT, close, connect};
pub use uri::AmqpUri;

/// How to connect to a RabbitMQ.
#[derive(Clone, Debug)]
pub struct Access {
    /// The address, virtual host, user and password.
    pub uri: AmqpUri,
    /// PEM certificates of authorities to trust in addition to the system's.
    pub authorities: Option<String>,
}

/// The delays between attempts at an operation that must succeed eventually: doubling from 100 ms
/// to about 1 s, without end.
#[must_use]
pub fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_millis(700))
        .with_jitter()
        .without_max_times()
        .build()
}
