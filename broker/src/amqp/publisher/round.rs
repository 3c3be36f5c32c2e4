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
use lapin::{Channel, Confirmation, PublisherConfirm};

use super::{Batch, Outgoing};
use crate::PublishError;

const PERSISTENT: u8 = 2;

/// Why the round failed. The connection cannot be used any more.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RoundError(pub(super) String);

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
    /// Adds a batch of `all` messages, of which the broker refused `refused`.
    fn add(&mut self, queue: ShortString, all: u64, refused: u64) {
        self.confirmed += all - refused;
        self.refused += refused;
        let has_accepted = refused < all;
        match self.queues.iter_mut().find(|(known, _)| *known == queue) {
            Some((_, accepted_before)) => *accepted_before |= has_accepted,
            None => self.queues.push((queue, has_accepted)),
        }
    }
}

/// How long the steps of a round took.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Durations {
    /// Until all frames were written.
    pub(super) written: Duration,
    /// From then until all messages were confirmed.
    pub(super) confirmed: Duration,
}

/// The publisher confirms of all messages.
struct Confirms {
    /// In the order of the messages.
    outcomes: Vec<Outcome>,
    /// The queues that do not exist.
    missing: HashSet<ShortString>,
    durations: Durations,
}

/// The publisher confirm of one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Confirmed,
    Refused,
}

/// Publishes `batches` on `channel`, waits for the confirms of all messages, and only then answers
/// the batches. No other message may be outstanding on the channel.
///
/// lapin attaches a returned (unroutable) message to the next confirm, which may belong to another
/// caller's message. So no batch is answered before all confirms have arrived: one of them carries
/// the returned message, which names the missing queue.
pub(super) async fn publish(
    channel: &Channel,
    mut batches: Vec<Batch>,
) -> Result<RoundSummary, RoundError> {
    let confirms = publish_all(channel, &mut batches).await;
    let Confirms { outcomes, missing, durations } = match confirms {
        Ok(confirms) => confirms,
        Err(RoundError(reason)) => {
            for batch in batches {
                // An error means that the caller has stopped waiting.
                let _ = batch.reply.send(Err(PublishError::Away(reason.clone())));
            }
            return Err(RoundError(reason));
        }
    };
    let mut summary = RoundSummary { durations, ..RoundSummary::default() };
    let mut outcomes = outcomes.into_iter();
    for batch in batches {
        let outcomes = outcomes.by_ref().take(batch.messages.len()).enumerate();
        let refused = outcomes.filter(|(_, outcome)| *outcome == Outcome::Refused);
        let positions: Vec<usize> = refused.map(|(position, _)| position).collect();
        let (all, refused) = (batch.messages.len() as u64, positions.len() as u64);
        let answer = if missing.contains(&batch.queue) {
            // The queue may have confirmed earlier messages of the batch, but they were lost with
            // it.
            summary.unroutable += all;
            Err(PublishError::Unroutable)
        } else {
            summary.add(batch.queue, all, refused);
            if positions.is_empty() { Ok(()) } else { Err(PublishError::Refused { positions }) }
        };
        let _ = batch.reply.send(answer);
    }
    Ok(summary)
}

async fn publish_all(channel: &Channel, batches: &mut [Batch]) -> Result<Confirms, RoundError> {
    let failed = |error: lapin::Error| RoundError(error.to_string());
    let started = Instant::now();
    // Start all before awaiting any, so that their frames share writes.
    let mut started_publishes = Vec::new();
    for Batch { queue, messages, .. } in batches {
        let publishes = messages.iter_mut().map(|message| start_publish(channel, queue, message));
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
                return Err(RoundError("the channel is not in confirm mode".to_owned()));
            }
        };
        outcomes.push(outcome);
        missing.extend(returned.map(|message| message.delivery.routing_key.clone()));
    }
    let durations = Durations { written, confirmed: started.elapsed().saturating_sub(written) };
    Ok(Confirms { outcomes, missing, durations })
}

/// Starts a publish: the first poll passes the message's frames to lapin. The returned future
/// resolves when they are written. It is awaited only after all publishes of the round have
/// started.
fn start_publish<'a>(
    channel: &'a Channel,
    queue: &ShortString,
    message: &'a mut Outgoing,
) -> Pin<Box<MaybeDone<impl Future<Output = lapin::Result<PublisherConfirm>> + use<'a>>>> {
    let properties = std::mem::take(&mut message.properties).with_delivery_mode(PERSISTENT);
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let publish =
        channel.basic_publish("".into(), queue.clone(), mandatory, &message.body, properties);
    let mut publish = Box::pin(maybe_done(publish));
    // The result does not matter here, because the future is awaited later.
    let _ = publish.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    publish
}
