//! The errors of publishing and of inspecting the queue.

use std::path::PathBuf;
use std::time::Duration;

use sqlite_file::OpenError;

/// Why a batch was not confirmed. Some of its messages may be in the queue nevertheless.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PublishError {
    /// There is no usable connection, or the file cannot be written.
    #[error("the broker is away: {0}")]
    Away(String),
    /// The number of unconfirmed messages is at its limit: the broker confirms too slowly.
    #[error("{0} messages are unconfirmed already")]
    Full(usize),
    /// The broker did not confirm in time.
    #[error("the broker did not confirm within {0:?}")]
    Timeout(Duration),
    /// The broker refused messages (`basic.nack`), for example because a queue is full.
    #[error("the broker refused {} of the messages", positions.len())]
    Refused {
        /// The positions of the refused messages in the batch; all others are confirmed.
        positions: Vec<usize>,
    },
    /// The queue does not exist; the publisher declares it again.
    #[error("the queue does not exist")]
    Unroutable,
}

/// Why an operation of the inspector failed.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The file cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The file cannot be read or written.
    #[error("cannot read or write {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// SQLite's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The broker is away, the connection was lost, or the broker refused the operation.
    #[error("the broker is away: {0}")]
    Away(String),
}
