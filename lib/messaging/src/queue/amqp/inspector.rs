//! Inspects the queues on RabbitMQ; lists, redrives and purges dead letters.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::try_join_all;
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use runtime::Supervisor;
use tokio::time::timeout;

use super::publisher::{Outgoing, Publisher};
use super::topology::Topology;
use super::{depths, history};
use crate::amqp::{self, Access, Connection};
use crate::queue::config::QueueConfig;
use crate::queue::dead_letter::{DeadLetter, DeadLetterAction, Selection};
use crate::queue::error::{InspectError, PublishError};
use crate::queue::gauges::Depths;

/// When no letter has arrived for this time, a pass asks the queue whether any is left: another
/// client may have taken the rest.
const IDLE: Duration = Duration::from_secs(2);
/// The most unacked letters of one consumer, which bounds the memory. To hold more letters, a pass
/// adds consumers. Without a prefetch, a quorum queue would stop after it has delivered 2,000.
const PREFETCH: u16 = 5_000;
/// The most letters that are redriven or purged together. If the connection is lost during a
/// redrive, up to this many letters exist twice.
const BATCH: usize = 500;
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the publisher may take to connect and to declare the queues.
const START_TIMEOUT: Duration = Duration::from_secs(15);

/// See [`crate::queue::Inspector`].
pub(crate) struct Inspector {
    access: Access,
    topology: Topology,
    connection: Connection,
}

/// A consumer of the dead letters, on a channel of its own.
struct LetterConsumer {
    channel: Channel,
    letters: lapin::Consumer,
    /// The number of letters that stay unacked, so that the broker requeues them when the channel
    /// is closed.
    held: usize,
}

impl Inspector {
    pub(crate) async fn open(access: Access, queue: &QueueConfig) -> Result<Self, InspectError> {
        let connection = connect(&access).await?;
        Ok(Self { access, topology: Topology::new(queue), connection })
    }

    pub(crate) async fn depths(&self) -> Result<Depths, InspectError> {
        let inspecting = async {
            let further = self.topology.further_shards(&self.connection).await?;
            self.topology.inspect(&self.connection, &further).await
        };
        Ok(within_deadline(inspecting).await?.depths)
    }

    /// Letters that another inspector holds at this moment are not included.
    pub(crate) async fn dead_letters(
        &self,
        selection: &Selection,
        action: DeadLetterAction,
        on_done: impl FnMut(DeadLetter) + Send,
    ) -> Result<(), InspectError> {
        let counting = depths::counted_depth(&self.connection, &self.topology.dead);
        let count = within_deadline(counting).await?;
        if count == 0 {
            return Ok(());
        }
        let publisher = match action {
            DeadLetterAction::Redrive => Some(self.publisher().await?),
            DeadLetterAction::List | DeadLetterAction::Purge => None,
        };
        // When this connection ends, the broker requeues all unacked letters, even if this future
        // is dropped.
        let connection = connect(&self.access).await?;
        let dead = &self.topology.dead;
        let mut pass = Pass { connection, dead, action, publisher, consumers: Vec::new() };
        let outcome = pass.run(count, selection, on_done).await;
        let ended = pass.end().await;
        outcome.and(ended)
    }

    pub(crate) async fn close(self) {
        amqp::close(&self.connection).await;
    }

    /// Starts a publisher and waits until it is connected, and thus has declared the queues.
    async fn publisher(&self) -> Result<Publisher, InspectError> {
        let publisher = Publisher::start(
            self.access.clone(),
            self.topology.clone(),
            "lastseen redrive",
            &Supervisor::default(),
        );
        let mut status = publisher.status();
        // Report the first status instead of retrying, so that the operator does not have to wait.
        // If there is no status within the timeout, report the initial one.
        _ = timeout(START_TIMEOUT, status.changed()).await;
        status.borrow().clone().map_err(InspectError::Away)?;
        Ok(publisher)
    }
}

/// One pass over the dead letters.
struct Pass<'a> {
    connection: Connection,
    dead: &'a ShortString,
    action: DeadLetterAction,
    publisher: Option<Publisher>,
    /// Each consumer except the last holds [`PREFETCH`] letters.
    consumers: Vec<LetterConsumer>,
}

impl Pass<'_> {
    /// Processes the next `count` letters, or fewer if no more arrive.
    async fn run(
        &mut self,
        count: u64,
        selection: &Selection,
        mut on_done: impl FnMut(DeadLetter) + Send,
    ) -> Result<(), InspectError> {
        let mut remaining = count;
        while remaining > 0 {
            if self.consumers.last().is_none_or(LetterConsumer::is_full) {
                self.consumers.push(LetterConsumer::open(&self.connection, self.dead).await?);
            }
            let Some(consumer) = self.consumers.last_mut() else { continue };
            let mut batch = Vec::new();
            while remaining > 0
                && batch.len() < BATCH
                && consumer.held + batch.len() < PREFETCH.into()
            {
                let Some(delivery) = consumer.next(self.dead).await? else {
                    remaining = 0;
                    break;
                };
                remaining -= 1;
                let letter = history::dead_letter(delivery.data.clone(), &delivery.properties);
                if !selection.matches(&letter) {
                    consumer.held += 1;
                } else if self.action == DeadLetterAction::List {
                    consumer.held += 1;
                    on_done(letter);
                } else {
                    batch.push((letter, delivery));
                }
            }
            if let Some(publisher) = &self.publisher {
                redrive(publisher, batch.iter().map(|(_, delivery)| delivery)).await?;
            }
            ack(batch.iter().map(|(_, delivery)| delivery)).await?;
            for (letter, _) in batch {
                on_done(letter);
            }
        }
        Ok(())
    }

    /// Makes sure that the acks are applied and that held letters are back in their places, so that
    /// the next inspector finds them.
    async fn end(self) -> Result<(), InspectError> {
        let Self { connection, dead, publisher, consumers, .. } = self;
        let given_back = give_back(&connection, dead, consumers).await;
        amqp::close(&connection).await;
        if let Some(publisher) = publisher {
            publisher.close().await;
        }
        given_back
    }
}

async fn give_back(
    connection: &Connection,
    dead: &ShortString,
    consumers: Vec<LetterConsumer>,
) -> Result<(), InspectError> {
    // Cancel all consumers first; otherwise the last would receive the letters that the others give
    // back. The cancels also flush the acks. While many acks are pending at a quorum queue, the
    // broker's channel process buffers further acks, and it discards the buffer when the channel is
    // closed. The response to the cancel shows that the pending acks are applied, and querying the
    // depth gives the channel process time to send the buffered ones.
    for LetterConsumer { channel, letters, .. } in &consumers {
        within_deadline(channel.basic_cancel(letters.tag(), BasicCancelOptions::default())).await?;
    }
    for LetterConsumer { channel, held, .. } in consumers {
        let before = within_deadline(depths::counted_depth(connection, dead)).await?;
        // Closing the channel requeues its letters in order; one multiple nack would not.
        within_deadline(channel.close(200, "done".into())).await?;
        let requeued = async {
            while depth(connection, dead).await? < before + held as u64 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok::<_, InspectError>(())
        };
        // If another client takes the letters at once, they never appear in the depth.
        timeout(IDLE, requeued).await.unwrap_or(Ok(()))?;
    }
    Ok(())
}

impl LetterConsumer {
    async fn open(connection: &Connection, dead: &ShortString) -> Result<Self, InspectError> {
        let channel = within_deadline(connection.create_channel()).await?;
        let consuming = async {
            channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            channel.basic_consume(dead.clone(), "".into(), options, FieldTable::default()).await
        };
        let letters = within_deadline(consuming).await?;
        Ok(Self { channel, letters, held: 0 })
    }

    fn is_full(&self) -> bool {
        self.held == usize::from(PREFETCH)
    }

    /// The next letter; `None` if the queue has no more.
    async fn next(&mut self, dead: &ShortString) -> Result<Option<Delivery>, InspectError> {
        if let Some(letter) = self.next_within(IDLE).await? {
            return Ok(Some(letter));
        }
        let any_left = within_deadline(depths::count_ready(&self.channel, dead)).await? > 0;
        // A letter that the queue sent before its response has arrived.
        let next = self.next_within(if any_left { IDLE } else { Duration::ZERO }).await?;
        if any_left && next.is_none() {
            let reason = "the broker delivers no dead letter, although the queue has some";
            return Err(InspectError::Away(reason.to_owned()));
        }
        Ok(next)
    }

    async fn next_within(&mut self, wait: Duration) -> Result<Option<Delivery>, InspectError> {
        match timeout(wait, self.letters.next()).await {
            Ok(Some(Ok(delivery))) => Ok(Some(delivery)),
            Ok(Some(Err(error))) => Err(InspectError::Away(error.to_string())),
            Ok(None) => Err(InspectError::Away("the broker cancelled the consumer".to_owned())),
            // The stream can stop without ending.
            Err(_) if !self.channel.status().connected() => {
                Err(InspectError::Away("the channel is closed".to_owned()))
            }
            Err(_) => Ok(None),
        }
    }
}

/// Publishes copies of `letters` to the queues of their objects, and waits until all are confirmed.
async fn redrive(
    publisher: &Publisher,
    letters: impl ExactSizeIterator<Item = &Delivery>,
) -> Result<(), InspectError> {
    let copy = |letter: &Delivery| Outgoing {
        queue: publisher.topology.queue_of_body(&letter.data).clone(),
        body: letter.data.clone(),
        properties: history::redriven(&letter.properties),
    };
    publisher.publish(letters.map(copy), CONFIRM_TIMEOUT).await.map_err(|error| match error {
        PublishError::Away(reason) => InspectError::Away(reason),
        other => InspectError::Away(other.to_string()),
    })
}

async fn ack(letters: impl Iterator<Item = &Delivery>) -> Result<(), InspectError> {
    let acks = letters.map(|letter| letter.acker.ack(BasicAckOptions::default()));
    let sent = within_deadline(try_join_all(acks)).await?;
    // lapin returns `false` for an ack that was never sent.
    if sent.contains(&false) {
        return Err(InspectError::Away("the channel is lost".to_owned()));
    }
    Ok(())
}

async fn connect(access: &Access) -> Result<Connection, InspectError> {
    let connected = amqp::connect(access, "lastseen inspector").await;
    connected.map_err(|error| InspectError::Away(error.to_string()))
}

async fn depth(connection: &Connection, queue: &ShortString) -> Result<u64, InspectError> {
    within_deadline(depths::depth(connection, queue)).await
}

async fn within_deadline<T, E: ToString>(
    request: impl Future<Output = Result<T, E>>,
) -> Result<T, InspectError> {
    amqp::within_deadline(request).await.map_err(InspectError::Away)
}
