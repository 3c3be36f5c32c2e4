//! The errors of opening a broker session.

use ::amqp::ConnectError;

use super::topology::TopologyError;

pub(super) use ::amqp::{Link, OutageLog, RPC_TIMEOUT, close, connect};

/// Why there is no broker session. Each variant is named after the step that failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("cannot prepare the queues: {0}")]
    Topology(#[from] TopologyError),
    #[error("cannot open the channel: {0}")]
    OpenChannel(#[source] lapin::Error),
    #[error("cannot consume: {0}")]
    Consume(#[source] lapin::Error),
    #[error("no response from the broker within {RPC_TIMEOUT:?}")]
    Timeout(#[from] tokio::time::error::Elapsed),
}
