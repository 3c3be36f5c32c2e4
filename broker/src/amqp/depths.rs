//! How many messages lie in the queues.

use lapin::options::QueueDeclareOptions;
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, ErrorKind};

use super::topology::Topology;
use crate::Depths;

const NOT_FOUND: u16 = 404;

/// What a look at all queues has found.
pub(super) struct Found {
    pub(super) depths: Depths,
    /// The queues that do not exist.
    pub(super) missing: Vec<ShortString>,
}

/// The queues are counted one after the other: a message that moves meanwhile may be counted twice or
/// not at all.
pub(super) async fn look(connection: &Connection, topology: &Topology) -> lapin::Result<Found> {
    let (mut channel, mut missing) = (None, Vec::new());
    let mut depth = async |queue: &ShortString| {
        let depth = depth_by(&mut channel, connection, queue).await?;
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
    Ok(Found { depths: Depths { ready, delayed, dead }, missing })
}

/// The queues that do not exist.
pub(super) async fn missing(
    connection: &Connection,
    topology: &Topology,
) -> lapin::Result<Vec<ShortString>> {
    Ok(look(connection, topology).await?.missing)
}

/// How many messages of `queue` are ready; 0 if there is no such queue.
pub(super) async fn depth(connection: &Connection, queue: &ShortString) -> lapin::Result<u64> {
    Ok(depth_by(&mut None, connection, queue).await?.unwrap_or(0))
}

/// How many messages are ready; `None` if there is no such queue.
async fn depth_by(
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
        // The broker closes the channel along with its answer that there is none.
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_missing(error: &lapin::Error) -> bool {
    // A queue whose node is down is NOT_FOUND as well, and not empty.
    matches!(error.kind(), ErrorKind::ProtocolError(error)
        if error.get_id() == NOT_FOUND && error.get_message().as_str().contains("no queue"))
}
