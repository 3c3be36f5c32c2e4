//! How many messages lie in the queues.

use lapin::options::QueueDeclareOptions;
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, Connection, ErrorKind};

use super::topology::Topology;
use crate::Depths;

const NOT_FOUND: u16 = 404;

/// The queues are counted one after the other: a message that moves meanwhile may be counted twice or
/// not at all.
pub(super) async fn depths(connection: &Connection, topology: &Topology) -> lapin::Result<Depths> {
    let mut channel = None;
    let mut delayed = 0;
    for delay in &topology.delays {
        delayed += depth_by(&mut channel, connection, delay).await?;
    }
    let ready = depth_by(&mut channel, connection, &topology.queue).await?;
    let dead = depth_by(&mut channel, connection, &topology.dead).await?;
    Ok(Depths { ready, delayed, dead })
}

/// How many messages of `queue` are ready; 0 if there is no such queue.
pub(super) async fn depth(connection: &Connection, queue: &ShortString) -> lapin::Result<u64> {
    depth_by(&mut None, connection, queue).await
}

async fn depth_by(
    channel: &mut Option<Channel>,
    connection: &Connection,
    queue: &ShortString,
) -> lapin::Result<u64> {
    let open = match channel.take() {
        Some(open) => open,
        None => connection.create_channel().await?,
    };
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match open.queue_declare(queue.clone(), passive, FieldTable::default()).await {
        Ok(queue) => {
            *channel = Some(open);
            Ok(queue.message_count().into())
        }
        // The broker closes the channel along with its answer that there is none.
        Err(error) if is_missing(&error) => Ok(0),
        Err(error) => Err(error),
    }
}

fn is_missing(error: &lapin::Error) -> bool {
    // A queue whose node is down is NOT_FOUND as well, and not empty.
    matches!(error.kind(), ErrorKind::ProtocolError(error)
        if error.get_id() == NOT_FOUND && error.get_message().as_str().contains("no queue"))
}
