//! Counts the messages and the consumers of a queue.

use lapin::options::{BasicGetOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use lapin::{Channel, ErrorKind};

use super::delivery::REQUEUE;
use crate::amqp::Connection;

const NOT_FOUND: u16 = 404;

/// The broker's response to a passive declaration.
#[derive(Clone, Copy, Default)]
pub(super) struct QueueCounts {
    pub(super) ready: u64,
    /// The consumers that the queue knows, in all connections. Of a shard, RabbitMQ 3.10 and 4.3
    /// count only the active consumer.
    pub(super) consumers: u32,
}

impl QueueCounts {
    /// Whether there is no consumer for the ready messages.
    pub(super) fn lacks_consumer(self) -> bool {
        self.ready > 0 && self.consumers == 0
    }
}

/// The number of ready messages in `queue`; 0 if it does not exist. In doubt, the queue itself
/// counts, see [`count_ready`].
pub(super) async fn counted_depth(
    connection: &Connection,
    queue: &ShortString,
) -> lapin::Result<u64> {
    let mut channel = None;
    match (counts_on(&mut channel, connection, queue).await?, channel) {
        (Some(QueueCounts { ready: 0, .. }), Some(channel)) => {
            let count = count_ready(&channel, queue).await?;
            channel.close(200, "done".into()).await.and(Ok(count))
        }
        (counts, _) => Ok(counts.unwrap_or_default().ready),
    }
}

/// The number of ready messages in `queue`, by a `basic.get`, to which the queue itself responds.
/// Of a quorum queue, a majority of the members has to be there. Anything that the queue sent on
/// this channel before the response has arrived.
///
/// If there is a message, it is requeued at once, but may lose its place.
pub(super) async fn count_ready(channel: &Channel, queue: &ShortString) -> lapin::Result<u64> {
    let Some(message) = channel.basic_get(queue.clone(), BasicGetOptions::default()).await? else {
        return Ok(0);
    };
    let further = u64::from(message.message_count);
    message.nack(REQUEUE).await?;
    Ok(1 + further)
}

/// The number of ready messages in `queue`; 0 if it does not exist. See [`counts_on`].
pub(super) async fn depth(connection: &Connection, queue: &ShortString) -> lapin::Result<u64> {
    Ok(counts_on(&mut None, connection, queue).await?.unwrap_or_default().ready)
}

/// The ready messages and the consumers; `None` if the queue does not exist. Opens a channel if
/// `channel` is `None`.
///
/// The broker also responds with 0 messages and 0 consumers if the leader of a quorum queue does not
/// report the numbers to it within 250 ms. Where a wrong 0 matters, use [`counted_depth`].
pub(super) async fn counts_on(
    channel: &mut Option<Channel>,
    connection: &Connection,
    queue: &ShortString,
) -> lapin::Result<Option<QueueCounts>> {
    let open = match channel.take() {
        Some(open) => open,
        None => connection.create_channel().await?,
    };
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    match open.queue_declare(queue.clone(), passive, FieldTable::default()).await {
        Ok(queue) => {
            *channel = Some(open);
            let ready = queue.message_count().into();
            Ok(Some(QueueCounts { ready, consumers: queue.consumer_count() }))
        }
        // The broker has closed the channel with the error.
        Err(error) if is_missing(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_missing(error: &lapin::Error) -> bool {
    // The broker also responds with NOT_FOUND if the queue's node is down. Such a queue exists, and
    // may have messages.
    matches!(error.kind(), ErrorKind::ProtocolError(error)
        if error.get_id() == NOT_FOUND && error.get_message().as_str().contains("no queue"))
}
