//! Inspects the queues on RabbitMQ; lists, redrives and purges dead letters.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::future::try_join_all;
use lapin::Channel;
use lapin::message::Delivery;
use lapin::options::{BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicQosOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::time::timeout;

use super::link::{self, Link, RPC_TIMEOUT};
use super::publisher::{Outgoing, Publisher};
use super::topology::Topology;
use super::{Config, depths, history};
use crate::PublishError;
use crate::inspector::{DeadLetter, DeadLetterAction, Depths, InspectError, Selection};

/// If no letter arrives for this time, there are no more: another client has taken some meanwhile.
const IDLE: Duration = Duration::from_secs(2);
/// Letters that one consumer may hold, which bounds the memory. More letters get more consumers.
/// Without a prefetch, a quorum queue would deliver 2,000 and then no more.
const PREFETCH: u16 = 5_000;
/// Letters that are redriven or deleted together. If the connection is lost, up to this many exist
/// twice.
const BATCH: usize = 500;
const CONFIRM_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the publisher may take to connect and to declare the queues.
const START_TIMEOUT: Duration = Duration::from_secs(15);

/// See [`crate::Inspector`].
pub(crate) struct Inspector {
    config: Config,
    topology: Topology,
    connection: Link,
}

/// A consumer of the dead letters, on a channel of its own.
struct LetterConsumer {
    channel: Channel,
    letters: lapin::Consumer,
    /// Letters that stay unacked, so that the broker requeues them when the channel is closed.
    held: usize,
}

impl Inspector {
    pub(crate) async fn open(config: Config) -> Result<Self, InspectError> {
        let connection = connect(&config).await?;
        Ok(Self { topology: Topology::new(&config), config, connection })
    }

    pub(crate) async fn depths(&self) -> Result<Depths, InspectError> {
        let state = within_deadline(depths::inspect(&self.connection, &self.topology)).await?;
        Ok(state.depths)
    }

    /// Letters that another inspector holds at this moment are not included.
    pub(crate) async fn dead_letters(
        &self,
        selection: &Selection,
        action: DeadLetterAction,
        on_done: impl FnMut(DeadLetter) + Send,
    ) -> Result<(), InspectError> {
        let count = depth(&self.connection, &self.topology.dead).await?;
        if count == 0 {
            return Ok(());
        }
        let publisher = match action {
            DeadLetterAction::Redrive => Some(self.publisher().await?),
            DeadLetterAction::List | DeadLetterAction::Purge => None,
        };
        // When this connection ends, the broker requeues all unacked letters, even if this future
        // is dropped.
        let connection = connect(&self.config).await?;
        let dead = &self.topology.dead;
        let mut pass = Pass { connection, dead, action, publisher, consumers: Vec::new() };
        let outcome = pass.run(count, selection, on_done).await;
        let ended = pass.end().await;
        outcome.and(ended)
    }

    pub(crate) async fn close(self) {
        link::close(&self.connection).await;
    }

    /// Starts a publisher and waits until it is connected, and thus has declared the main queue.
    async fn publisher(&self) -> Result<Publisher, InspectError> {
        let publisher = Publisher::start(self.config.clone(), "lastseen redrive");
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
    connection: Link,
    dead: &'a ShortString,
    action: DeadLetterAction,
    publisher: Option<Publisher>,
    /// All but the last are full.
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
        let mut left = count;
        while left > 0 {
            if self.consumers.last().is_none_or(LetterConsumer::is_full) {
                self.consumers.push(LetterConsumer::open(&self.connection, self.dead).await?);
            }
            let Some(consumer) = self.consumers.last_mut() else { continue };
            let mut batch = Vec::new();
            while left > 0 && batch.len() < BATCH && consumer.held + batch.len() < PREFETCH.into() {
                let Some(delivery) = consumer.next().await? else {
                    left = 0;
                    break;
                };
                left -= 1;
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
        link::close(&connection).await;
        if let Some(publisher) = publisher {
            publisher.close().await;
        }
        given_back
    }
}

async fn give_back(
    connection: &Link,
    dead: &ShortString,
    consumers: Vec<LetterConsumer>,
) -> Result<(), InspectError> {
    // Cancel all consumers first, or the last would receive the letters that the others give back.
    // Besides, the broker's channel process buffers acks while many are pending at a quorum queue,
    // and discards them when the channel is closed. The response to the cancel shows that the
    // pending acks are applied, and querying the depth gives the channel process time to send the
    // buffered ones.
    for LetterConsumer { channel, letters, .. } in &consumers {
        within_deadline(channel.basic_cancel(letters.tag(), BasicCancelOptions::default())).await?;
    }
    for LetterConsumer { channel, held, .. } in consumers {
        let before = depth(connection, dead).await?;
        // The broker requeues the letters of a closed channel in order, unlike those of one
        // multiple nack.
        within_deadline(channel.close(200, "done".into())).await?;
        let back = async {
            while depth(connection, dead).await? < before + held as u64 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok::<_, InspectError>(())
        };
        // If another client takes them at once, they never appear in the depth.
        timeout(IDLE, back).await.unwrap_or(Ok(()))?;
    }
    Ok(())
}

impl LetterConsumer {
    async fn open(connection: &Link, dead: &ShortString) -> Result<Self, InspectError> {
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

    /// The next letter; `None` if no more arrives.
    async fn next(&mut self) -> Result<Option<Delivery>, InspectError> {
        match timeout(IDLE, self.letters.next()).await {
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

/// Publishes copies of `letters` to the main queue, and waits until all are confirmed.
async fn redrive(
    publisher: &Publisher,
    letters: impl ExactSizeIterator<Item = &Delivery>,
) -> Result<(), InspectError> {
    let copy = |letter: &Delivery| Outgoing {
        body: letter.data.clone(),
        properties: history::redriven(&letter.properties),
    };
    publisher
        .publish(&publisher.topology().queue, letters.map(copy), CONFIRM_TIMEOUT)
        .await
        .map_err(|error| match error {
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

async fn connect(config: &Config) -> Result<Link, InspectError> {
    let connected = link::connect(&config.access, "lastseen inspector").await;
    connected.map_err(|error| InspectError::Away(error.to_string()))
}

async fn depth(connection: &Link, queue: &ShortString) -> Result<u64, InspectError> {
    within_deadline(depths::depth(connection, queue)).await
}

/// Awaits the broker's response. A healthy broker responds at once.
async fn within_deadline<T, E: ToString>(
    request: impl Future<Output = Result<T, E>>,
) -> Result<T, InspectError> {
    match timeout(RPC_TIMEOUT, request).await {
        Ok(response) => response.map_err(|error| InspectError::Away(error.to_string())),
        Err(_) => Err(InspectError::Away(format!("no response within {RPC_TIMEOUT:?}"))),
    }
}
