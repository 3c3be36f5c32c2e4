//! One round of publishing on one channel.
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

/// Why the connection cannot be gone on with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken(pub(super) String);

/// The broker's verdicts on the messages of a round.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) confirmed: u64,
    pub(super) refused: u64,
    pub(super) unroutable: u64,
    /// Each queue of the round, and whether it took at least one message.
    pub(super) queues: Vec<(ShortString, bool)>,
    pub(super) waits: Waits,
}

impl Tally {
    fn note(&mut self, queue: ShortString, all: u64, refused: u64) {
        self.confirmed += all - refused;
        self.refused += refused;
        let took_one = refused < all;
        match self.queues.iter_mut().find(|(known, _)| *known == queue) {
            Some((_, takes)) => *takes |= took_one,
            None => self.queues.push((queue, took_one)),
        }
    }
}

/// What a round has waited for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Waits {
    /// Until all frames were written.
    pub(super) written: Duration,
    /// From then on until all messages were confirmed.
    pub(super) confirmed: Duration,
}

/// What the broker said of all messages.
struct Verdicts {
    /// On each message, in the order of the batches.
    all: Vec<Verdict>,
    /// The queues that are gone.
    gone: HashSet<ShortString>,
    waits: Waits,
}

/// What the broker said of one message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Confirmed,
    Refused,
}

/// Publishes `batches` on `channel`, on which nothing else may be outstanding, waits for the verdict
/// on every message, and only then answers the batches.
///
/// lapin attaches a returned (unroutable) message to whichever publish is confirmed next, which may
/// be another caller's. So no batch is told "confirmed" before all that was outstanding together
/// is in: among those is the one that carries the return, which says itself which queue is gone.
pub(super) async fn publish(channel: &Channel, mut batches: Vec<Batch>) -> Result<Tally, Broken> {
    let outcome = publish_all(channel, &mut batches).await;
    let Verdicts { all, gone, waits } = match outcome {
        Ok(verdicts) => verdicts,
        Err(Broken(reason)) => {
            for batch in batches {
                // A caller whose deadline is over has gone.
                let _ = batch.reply.send(Err(PublishError::Away(reason.clone())));
            }
            return Err(Broken(reason));
        }
    };
    let mut tally = Tally { waits, ..Tally::default() };
    let mut verdicts = all.into_iter();
    for batch in batches {
        let verdicts = verdicts.by_ref().take(batch.messages.len()).enumerate();
        let refused = verdicts.filter(|(_, verdict)| *verdict == Verdict::Refused);
        let which: Vec<usize> = refused.map(|(position, _)| position).collect();
        let (all, refused) = (batch.messages.len() as u64, which.len() as u64);
        let answer = if gone.contains(&batch.queue) {
            // Maybe in the middle of the batch, with what was confirmed before.
            tally.unroutable += all;
            Err(PublishError::Unroutable)
        } else {
            tally.note(batch.queue, all, refused);
            if which.is_empty() { Ok(()) } else { Err(PublishError::Refused { which }) }
        };
        let _ = batch.reply.send(answer);
    }
    Ok(tally)
}

async fn publish_all(channel: &Channel, batches: &mut [Batch]) -> Result<Verdicts, Broken> {
    let broken = |error: lapin::Error| Broken(error.to_string());
    let started = Instant::now();
    // All are begun before any is awaited, so that their frames share writes.
    let mut begun = Vec::new();
    for Batch { queue, messages, .. } in batches {
        begun.extend(messages.iter_mut().map(|message| begin(channel, queue, message)));
    }
    let mut confirms = Vec::with_capacity(begun.len());
    for mut publish in begun {
        publish.as_mut().await;
        confirms.extend(publish.as_mut().take_output().transpose().map_err(broken)?);
    }
    let written = started.elapsed();
    let mut all = Vec::with_capacity(confirms.len());
    let mut gone = HashSet::new();
    for confirm in confirms {
        let (verdict, returned) = match confirm.await.map_err(broken)? {
            Confirmation::Ack(returned) => (Verdict::Confirmed, returned),
            Confirmation::Nack(returned) => (Verdict::Refused, returned),
            Confirmation::NotRequested => {
                return Err(Broken("the channel does not confirm".to_owned()));
            }
        };
        all.push(verdict);
        gone.extend(returned.map(|message| message.delivery.routing_key.clone()));
    }
    let waits = Waits { written, confirmed: started.elapsed().saturating_sub(written) };
    Ok(Verdicts { all, gone, waits })
}

/// Hands a message's frames over to lapin, which its first poll does. What is left is to learn that
/// they are written, for which nobody needs to be woken before all have been begun.
fn begin<'a>(
    channel: &'a Channel,
    queue: &ShortString,
    message: &'a mut Outgoing,
) -> Pin<Box<MaybeDone<impl Future<Output = lapin::Result<PublisherConfirm>> + use<'a>>>> {
    let properties = std::mem::take(&mut message.properties).with_delivery_mode(PERSISTENT);
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let publish =
        channel.basic_publish("".into(), queue.clone(), mandatory, &message.body, properties);
    let mut publish = Box::pin(maybe_done(publish));
    // Whether that is already known by now is seen when it is awaited.
    let _ = publish.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    publish
}
