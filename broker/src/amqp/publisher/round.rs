//! One round of publishing on one channel.

use std::collections::HashSet;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use lapin::options::BasicPublishOptions;
use lapin::{Channel, Confirmation};

use super::{Batch, Outgoing};
use crate::PublishError;

const PERSISTENT: u8 = 2;

/// Why the connection cannot be gone on with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Broken(pub(super) String);

/// What the broker said of the messages of a round.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) confirmed: u64,
    pub(super) refused: u64,
    pub(super) unroutable: u64,
}

/// What became of one message.
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
/// is in: among those is the one that carries the return.
pub(super) async fn publish(channel: &Channel, batches: Vec<Batch>) -> Result<Tally, Broken> {
    let outcome = publish_all(channel, &batches).await;
    let mut tally = Tally::default();
    let (verdicts, returned) = match outcome {
        Ok(outcome) => outcome,
        Err(Broken(reason)) => {
            for batch in batches {
                // A caller whose deadline is over has gone.
                let _ = batch.reply.send(Err(PublishError::Away(reason.clone())));
            }
            return Err(Broken(reason));
        }
    };
    let mut number = 0;
    for batch in batches {
        let mut is_unroutable = false;
        let mut which = Vec::new();
        for position in 0..batch.messages.len() {
            if returned.contains(&number) {
                tally.unroutable += 1;
                is_unroutable = true;
            } else if verdicts[number] == Verdict::Refused {
                tally.refused += 1;
                which.push(position);
            } else {
                tally.confirmed += 1;
            }
            number += 1;
        }
        let answer = if is_unroutable {
            // The queue has gone in the middle of the batch, with what was confirmed before.
            Err(PublishError::Unroutable)
        } else if which.is_empty() {
            Ok(())
        } else {
            Err(PublishError::Refused { which })
        };
        let _ = batch.reply.send(answer);
    }
    Ok(tally)
}

/// The verdict on each message, in the order of the batches, and the numbers of those returned.
async fn publish_all(
    channel: &Channel,
    batches: &[Batch],
) -> Result<(Vec<Verdict>, HashSet<usize>), Broken> {
    // Polled together, the frames of all of them share writes.
    let mut unconfirmed: FuturesUnordered<_> =
        batches
            .iter()
            .flat_map(|batch| &batch.messages)
            .enumerate()
            .map(|(number, message)| async move {
                (number, publish_one(channel, number, message).await)
            })
            .collect();
    let mut verdicts = vec![Verdict::Refused; unconfirmed.len()];
    let mut returned = HashSet::new();
    while let Some((number, confirmation)) = unconfirmed.next().await {
        let (verdict, message) = match confirmation {
            Ok(Confirmation::Ack(message)) => (Verdict::Confirmed, message),
            Ok(Confirmation::Nack(message)) => (Verdict::Refused, message),
            Ok(Confirmation::NotRequested) => {
                return Err(Broken("the channel does not confirm".to_owned()));
            }
            Err(error) => return Err(Broken(error.to_string())),
        };
        verdicts[number] = verdict;
        if let Some(message) = message {
            let id = message.delivery.properties.message_id().as_ref();
            let id = id.and_then(|id| id.as_str().parse().ok());
            let Some(id) = id.filter(|id| *id < verdicts.len()) else {
                return Err(Broken("a message came back that was not sent".to_owned()));
            };
            returned.insert(id);
        }
    }
    Ok((verdicts, returned))
}

/// The message id tells a returned message apart within its round.
async fn publish_one(
    channel: &Channel,
    number: usize,
    message: &Outgoing,
) -> lapin::Result<Confirmation> {
    let Outgoing { routing_key, body, properties } = message;
    let properties = properties
        .clone()
        .with_delivery_mode(PERSISTENT)
        .with_message_id(number.to_string().into());
    let mandatory = BasicPublishOptions { mandatory: true, ..BasicPublishOptions::default() };
    let key = routing_key.clone();
    channel.basic_publish("".into(), key, mandatory, body, properties).await?.await
}
