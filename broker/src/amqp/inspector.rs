//! Looking at the queues of a RabbitMQ, and treating the dead letters.

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
use crate::inspector::{DeadLetter, Depths, InspectError, Selection, Treatment};

/// When no letter has come for so long, there are no more: somebody else has taken some meanwhile.
const IDLE: Duration = Duration::from_secs(2);
/// Letters that one consumer may hold. Without a number, a quorum queue would give out 2,000 and
/// then no more. It bounds what lies in our memory; for more letters there are more consumers.
const PREFETCH: u16 = 5_000;
/// Letters that are redriven or deleted together. After a loss of the connection, so many are there
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
struct Intake {
    channel: Channel,
    letters: lapin::Consumer,
    /// Letters that were taken and stay unacked, so that they go back with the channel's end.
    held: usize,
}

impl Inspector {
    pub(crate) async fn open(config: Config) -> Result<Self, InspectError> {
        let connection = connect(&config).await?;
        Ok(Self { topology: Topology::new(&config), config, connection })
    }

    pub(crate) async fn depths(&self) -> Result<Depths, InspectError> {
        let found = answered(depths::look(&self.connection, &self.topology)).await?;
        Ok(found.depths)
    }

    /// What another look holds at this moment is not among the letters that are there.
    pub(crate) async fn dead_letters(
        &self,
        selection: &Selection,
        treatment: Treatment,
        treated: impl FnMut(DeadLetter) + Send,
    ) -> Result<(), InspectError> {
        let count = depth(&self.connection, &self.topology.dead).await?;
        if count == 0 {
            return Ok(());
        }
        let publisher = match treatment {
            Treatment::Redrive => Some(self.publisher().await?),
            Treatment::Look | Treatment::Purge => None,
        };
        // With its end, all that was taken goes back, also when this is dropped midway.
        let connection = connect(&self.config).await?;
        let dead = &self.topology.dead;
        let mut pass = Pass { connection, dead, treatment, publisher, intakes: Vec::new() };
        let outcome = pass.over(count, selection, treated).await;
        let ended = pass.end().await;
        outcome.and(ended)
    }

    pub(crate) async fn close(self) {
        link::close(&self.connection).await;
    }

    /// A publisher that is connected; the main queue is there then.
    async fn publisher(&self) -> Result<Publisher, InspectError> {
        let publisher = Publisher::start(self.config.clone(), "lastseen redrive");
        let mut status = publisher.status();
        // The first that is heard: an operator is told rather than kept waiting. If nothing is, it is
        // what the status begins with.
        _ = timeout(START_TIMEOUT, status.changed()).await;
        status.borrow().clone().map_err(InspectError::Away)?;
        Ok(publisher)
    }
}

/// One pass over the dead letters.
struct Pass<'a> {
    connection: Link,
    dead: &'a ShortString,
    treatment: Treatment,
    publisher: Option<Publisher>,
    /// All but the last hold as many letters as they may.
    intakes: Vec<Intake>,
}

impl Pass<'_> {
    /// Goes over the next `count` letters, or fewer when no more come.
    async fn over(
        &mut self,
        count: u64,
        selection: &Selection,
        mut treated: impl FnMut(DeadLetter) + Send,
    ) -> Result<(), InspectError> {
        let mut left = count;
        while left > 0 {
            if self.intakes.last().is_none_or(Intake::is_full) {
                self.intakes.push(Intake::open(&self.connection, self.dead).await?);
            }
            let Some(intake) = self.intakes.last_mut() else { continue };
            let mut batch = Vec::new();
            while left > 0 && batch.len() < BATCH && intake.held + batch.len() < PREFETCH.into() {
                let Some(delivery) = intake.next().await? else {
                    left = 0;
                    break;
                };
                left -= 1;
                let letter = history::dead_letter(delivery.data.clone(), &delivery.properties);
                if !selection.fits(&letter) {
                    intake.held += 1;
                } else if self.treatment == Treatment::Look {
                    intake.held += 1;
                    treated(letter);
                } else {
                    batch.push((letter, delivery));
                }
            }
            if let Some(publisher) = &self.publisher {
                redrive(publisher, batch.iter().map(|(_, delivery)| delivery)).await?;
            }
            ack(batch.iter().map(|(_, delivery)| delivery)).await?;
            for (letter, _) in batch {
                treated(letter);
            }
        }
        Ok(())
    }

    /// Sees that the acks are applied and that what was held is back where it was, so that whoever
    /// looks next finds it.
    async fn end(self) -> Result<(), InspectError> {
        let Self { connection, dead, publisher, intakes, .. } = self;
        let given_back = give_back(&connection, dead, intakes).await;
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
    intakes: Vec<Intake>,
) -> Result<(), InspectError> {
    // All of them first, or the last would be given what the others give back. Besides, a channel
    // keeps acks to itself while many are under way to a quorum queue, and forgets them when it is
    // closed. The cancel goes the same way and is answered, so that by then those before it are
    // applied; the look at the depth gives the channel the time to send the rest.
    for Intake { channel, letters, .. } in &intakes {
        answered(channel.basic_cancel(letters.tag(), BasicCancelOptions::default())).await?;
    }
    for Intake { channel, held, .. } in intakes {
        let before = depth(connection, dead).await?;
        // A closed channel's letters go back in their order, which a nack of many does not keep.
        answered(channel.close(200, "done".into())).await?;
        let back = async {
            while depth(connection, dead).await? < before + held as u64 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Ok::<_, InspectError>(())
        };
        // If somebody else takes them at once, they are never seen there.
        timeout(IDLE, back).await.unwrap_or(Ok(()))?;
    }
    Ok(())
}

impl Intake {
    async fn open(connection: &Link, dead: &ShortString) -> Result<Self, InspectError> {
        let channel = answered(connection.create_channel()).await?;
        let consuming = async {
            channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            channel.basic_consume(dead.clone(), "".into(), options, FieldTable::default()).await
        };
        let letters = answered(consuming).await?;
        Ok(Self { channel, letters, held: 0 })
    }

    fn is_full(&self) -> bool {
        self.held == usize::from(PREFETCH)
    }

    /// The next letter; `None` when none comes any more.
    async fn next(&mut self) -> Result<Option<Delivery>, InspectError> {
        match timeout(IDLE, self.letters.next()).await {
            Ok(Some(Ok(delivery))) => Ok(Some(delivery)),
            Ok(Some(Err(error))) => Err(InspectError::Away(error.to_string())),
            Ok(None) => Err(InspectError::Away("it has cancelled the consumer".to_owned())),
            // The stream can fall silent without an end.
            Err(_) if !self.channel.status().connected() => {
                Err(InspectError::Away("the channel is closed".to_owned()))
            }
            Err(_) => Ok(None),
        }
    }
}

/// Publishes copies of `letters` to the main queue, all of them confirmed on return.
async fn redrive(
    publisher: &Publisher,
    letters: impl ExactSizeIterator<Item = &Delivery>,
) -> Result<(), InspectError> {
    let copy = |letter: &Delivery| Outgoing {
        body: letter.data.clone(),
        properties: history::forgotten(&letter.properties),
    };
    publisher
        .publish(&publisher.topology().queue, letters.map(copy), CONFIRM_TIMEOUT)
        .await
        .map_err(|error| match error {
            PublishError::Away(reason) => InspectError::Away(reason),
            refused => InspectError::Away(refused.to_string()),
        })
}

async fn ack(letters: impl Iterator<Item = &Delivery>) -> Result<(), InspectError> {
    let acks = letters.map(|letter| letter.acker.ack(BasicAckOptions::default()));
    let sent = answered(try_join_all(acks)).await?;
    // `false` is lapin's word for an ack that was never sent.
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
    answered(depths::depth(connection, queue)).await
}

/// The answer of the broker, which gives it at once or not at all.
async fn answered<T, E: ToString>(
    request: impl Future<Output = Result<T, E>>,
) -> Result<T, InspectError> {
    match timeout(RPC_TIMEOUT, request).await {
        Ok(answer) => answer.map_err(|error| InspectError::Away(error.to_string())),
        Err(_) => Err(InspectError::Away(format!("no answer within {RPC_TIMEOUT:?}"))),
    }
}
