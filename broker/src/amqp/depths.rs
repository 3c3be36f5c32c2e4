//! Counts the messages in the queues.

use lapin::options::QueueDeclareOptions;
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, ErrorKind};

use super::topology::Topology;
use crate::Depths;

const NOT_FOUND: u16 = 404;

/// The result of [`inspect`].
pub(super) struct QueueState {
    pub(super) depths: Depths,
    /// The queues that do not exist.
    pub(super) missing: Vec<ShortString>,
}

/// Counts the messages in all queues. It counts one queue after the other, so a message that moves
/// meanwhile may be counted twice or not at all.
pub(super) async fn inspect(
    connection: &Connection,
    topology: &Topology,
) -> lapin::Result<QueueState> {
    let (mut channel, mut missing) = (None, Vec::new());
    let mut depth = async |queue: &ShortString| {
        let depth = depth_on(&mut channel, connection, queue).await?;
        if depth.is_none() {
            missing.push(queue.clone());
        }
        Ok::<u64, lapin::Error>(depth.unwrap_or(0))
    };
    let mut delayed = 0;
    for delay in &topology.delays {
        delayed += depth(delay).await?;
    }
    let (ready, dead) = (depth(&topology.queue).await?, depth(&topology.dead).await?);
    Ok(QueueState { depths: Depths { ready, delayed, dead }, missing })
}

/// The queues that do not exist.
pub(super) async fn missing(
    connection: &Connection,
    topology: &Topology,
) -> lapin::Result<Vec<ShortString>> {
    Ok(inspect(connection, topology).await?.missing)
}

/// The number of ready messages in `queue`; 0 if it does not exist.
pub(super) async fn depth(connection: &Connection, queue: &ShortString) -> lapin::Result<u64> {
    Ok(depth_on(&mut None, connection, queue).await?.unwrap_or(0))
}

/// The number of ready messages; `None` if the queue does not exist. Opens a channel if there is
/// none.
async fn depth_on(
    channel: &mut Option<Channel>,
    connection: &Connection,
    queue: &ShortString,
) -> lapin::Result<Option<u64>> {
    let open = match channel.take() {
        Some(open) => open,
        None => connection.create_channel().await?,
    };
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match open.queue_declare(queue.clone(), passive, FieldTable::default()).await {
        Ok(queue) => {
            *channel = Some(open);
            Ok(Some(queue.message_count().into()))
        }
        // The broker has closed the channel with the error.
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_missing(error: &lapin::Error) -> bool {
    // The broker also answers NOT_FOUND if the queue's node is down, but that queue is not empty.
    matches!(error.kind(), ErrorKind::ProtocolError(error)
        if error.get_id() == NOT_FOUND && error.get_message().as_str().contains("no queue"))
}
