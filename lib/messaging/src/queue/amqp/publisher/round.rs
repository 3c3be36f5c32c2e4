//! Publishes one round of batches on one channel.
//!
//! Decision: docs/decisions/0001-why-are-messages-published-in-rounds.md

use std::collections::HashSet;
use std::pin::Pin;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use futures_util::future::{MaybeDone, maybe_done};
use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::{BasicProperties, Channel, Confirmation, PublisherConfirm};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::queue::error::PublishError;

const PERSISTENT: u8 = 2;

#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    pub(crate) queue: ShortString,
    pub(crate) body: Vec<u8>,
    pub(crate) properties: BasicProperties,
}

/// The messages of one caller, which receives a single reply: all confirmed, or an error.
pub(super) struct Batch {
    pub(super) messages: Vec<Outgoing>,
    pub(super) reply: oneshot::Sender<Result<(), PublishError>>,
    /// Held until the reply is sent.
    pub(super) _permits: OwnedSemaphorePermit,
}

/// The outcome of a round: numbers of messages, queues and durations.
#[derive(Debug, Default)]
pub(super) struct RoundSummary {
    pub(super) confirmed: u64,
    pub(super) refused: u64,
    pub(super) unroutable: u64,
    /// Each queue of the round, and whether it accepted at least one message.
    pub(super) queues: Vec<(ShortString, bool)>,
    pub(super) durations: Durations,
}

impl RoundSummary {
    fn add(&mut self, queue: &ShortString, outcome: Outcome) {
        let is_accepted = outcome == Outcome::Confirmed;
        *if is_accepted { &mut self.confirmed } else { &mut self.refused } += 1;
        match self.queues.iter_mut().find(|(known, _)| known == queue) {
            Some((_, has_accepted)) => *has_accepted |= is_accepted,
            None => self.queues.push((queue.clone(), is_accepted)),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Durations {
    /// Until all frames were written.
    pub(super) written: Duration,
    /// From then until all messages were confirmed.
    pub(super) confirmed: Duration,
}

struct Confirms {
    /// In the order of the messages.
    outcomes: Vec<Outcome>,
    /// The queues that do not exist.
    missing: HashSet<ShortString>,
    durations: Durations,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Confirmed,
    Refused,
}

/// Publishes `batches` on `channel`, waits for the confirms of all messages, and only then sends
/// the reply to each batch. No other message may be outstanding on the channel.
///
/// lapin attaches a returned (unroutable) message to the next confirm, which may belong to another
/// caller's message. So no batch gets its reply before all confirms have arrived: one of the
/// confirms carries the returned message, which names the missing queue.
///
/// An error is the reason why the connection cannot be used any more.
pub(super) async fn publish(
    channel: &Channel,
    mut batches: Vec<Batch>,
) -> Result<RoundSummary, String> {
    let confirms = publish_all(channel, &mut batches).await;
    let Confirms { outcomes, missing, durations } = match confirms {
        Ok(confirms) => confirms,
        Err(reason) => {
            for batch in batches {
                // An error means that the caller has stopped waiting.
                let _ = batch.reply.send(Err(PublishError::Away(reason.clone())));
            }
            return Err(reason);
        }
    };
    let mut summary = RoundSummary { durations, ..RoundSummary::default() };
    let mut outcomes = outcomes.into_iter();
    for batch in batches {
        let outcomes = batch.messages.iter().zip(outcomes.by_ref());
        let reply = if batch.messages.iter().any(|message| missing.contains(&message.queue)) {
            // The queue may have confirmed earlier messages of the batch, but they were lost with
            // it.
            summary.unroutable += outcomes.count() as u64;
            Err(PublishError::Unroutable)
        } else {
            let mut positions = Vec::new();
            for (position, (message, outcome)) in outcomes.enumerate() {
                summary.add(&message.queue, outcome);
                if outcome == Outcome::Refused {
                    positions.push(position);
                }
            }
            if positions.is_empty() { Ok(()) } else { Err(PublishError::Refused { positions }) }
        };
        let _ = batch.reply.send(reply);
    }
    Ok(summary)
}

async fn publish_all(channel: &Channel, batches: &mut [Batch]) -> Result<Confirms, String> {
    let failed = |error: lapin::Error| error.to_string();
    let started = Instant::now();
    // Start all publishes before awaiting any, so that their frames share writes.
    let mut started_publishes = Vec::new();
    for Batch { messages, .. } in batches {
        let publishes = messages.iter_mut().map(|message| start_publish(channel, message));
        started_publishes.extend(publishes);
    }
    let mut confirms = Vec::with_capacity(started_publishes.len());
    for mut publish in started_publishes {
        publish.as_mut().await;
        confirms.extend(publish.as_mut().take_output().transpose().map_err(failed)?);
    }
    let written = started.elapsed();
    let mut outcomes = Vec::with_capacity(confirms.len());
    let mut missing = HashSet::new();
    for confirm in confirms {
        let (outcome, returned) = match confirm.await.map_err(failed)? {
            Confirmation::Ack(returned) => (Outcome::Confirmed, returned),
            Confirmation::Nack(returned) => (Outcome::Refused, returned),
            Confirmation::NotRequested => {
                return Err("the channel is not in confirm mode".to_owned());
            }
        };
        outcomes.push(outcome);
        missing.extend(returned.map(|message| message.delivery.routing_key.clone()));
    }
    let durations = Durations { written, confirmed: started.elapsed().saturating_sub(written) };
    Ok(Confirms { outcomes, missing, durations })
}

/// Starts a publish: the first poll passes the message's frames to lapin. The returned future
/// resolves when the frames are written.
fn start_publish<'a>(
    channel: &'a Channel,
    message: &'a mut Outgoing,
) -> Pin<Box<MaybeDone<impl Future<Output = lapin::Result<PublisherConfirm>> + use<'a>>>> {
    let properties = std::mem::take(&mut message.properties).with_delivery_mode(PERSISTENT);
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let queue = message.queue.clone();
    let publish = channel.basic_publish("".into(), queue, mandatory, &message.body, properties);
    let mut publish = Box::pin(maybe_done(publish));
    // The result does not matter here, because the future is awaited later.
    let _ = publish.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    publish
}
