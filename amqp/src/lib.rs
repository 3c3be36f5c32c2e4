//! A connection to a RabbitMQ, and nothing of what goes over it: where the broker is, as whom, whom to
//! trust; opening a connection with a deadline on every step; the waits between attempts.

mod link;
pub mod settings;
mod uri;

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};

pub use link::{ConnectError, Link, OutageLog, RPC_TIMEOUT, close, connect};
pub use uri::AmqpUri;

/// How to get to a RabbitMQ.
#[derive(Clone, Debug)]
pub struct Access {
    /// Where it is, and as whom.
    pub uri: AmqpUri,
    /// Certificates, as PEM, of authorities to trust besides the system's.
    pub authorities: Option<String>,
}

/// The waits between attempts at what must succeed in the end: from 100 ms, doubling, to about 1 s,
/// for ever.
#[must_use]
pub fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_millis(700))
        .with_jitter()
        .without_max_times()
        .build()
}
