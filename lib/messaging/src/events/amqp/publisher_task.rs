//! The tokio task that publishes an emitter's events.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Channel};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::timeout;
use uuid::Uuid;

use super::topic_exchange::TopicExchange;
use crate::amqp::{self, Connection, RPC_TIMEOUT, Reconnector};
use crate::events::change::Kind;
use crate::events::message::Content;

/// How often an idle task checks the connection.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
const TRANSIENT: u8 = 1;

/// A message that has a number and is not encoded yet.
pub(crate) struct Outgoing {
    pub(crate) sequence: u64,
    pub(crate) content: Content,
}

/// The last number that was assigned to a message, whether or not the message was published.
pub(crate) type SequenceCounter = Arc<Mutex<u64>>;

enum SessionEnd {
    Finished,
    Lost(String),
}

/// Publishes messages until all emitters are dropped. Drops the messages that arrive while the
/// broker is away.
pub(crate) async fn publish_all(
    exchange: Arc<TopicExchange>,
    mut reconnector: Reconnector,
    mut messages: mpsc::Receiver<Outgoing>,
    sequence: SequenceCounter,
) {
    let source = Uuid::now_v7();
    let mut last_sent = 0;
    loop {
        let opening = reconnector.open(async |connection| {
            let channel = exchange.open(&connection).await?;
            Ok((connection, channel))
        });
        let opened = drop_messages_while(&mut messages, opening).await;
        let Some((connection, channel)) = opened else { return };
        let mut session = Session { exchange: &exchange, source, connection, channel, last_sent };
        let ended = session.serve(&mut messages, &sequence).await;
        last_sent = session.last_sent;
        match ended {
            SessionEnd::Finished => return amqp::close(&session.connection).await,
            SessionEnd::Lost(reason) => reconnector.mark_closed(reason),
        }
    }
}

/// Awaits `opening` and drops the messages that arrive meanwhile. Returns `None` when all emitters
/// are dropped.
async fn drop_messages_while<T>(
    messages: &mut mpsc::Receiver<Outgoing>,
    opening: impl Future<Output = T>,
) -> Option<T> {
    let mut opening = pin!(opening);
    loop {
        tokio::select! {
            opened = &mut opening => return Some(opened),
            message = messages.recv() => {
                drop(message?);
                count("dropped");
            }
        }
    }
}

struct Session<'a> {
    exchange: &'a TopicExchange,
    source: Uuid,
    connection: Connection,
    channel: Channel,
    /// The last number that was published, in this session or an earlier one.
    last_sent: u64,
}

impl Session<'_> {
    async fn serve(
        &mut self,
        messages: &mut mpsc::Receiver<Outgoing>,
        sequence: &SequenceCounter,
    ) -> SessionEnd {
        loop {
            // A waiting message shows a gap by its number. If none is waiting, publish a marker
            // without objects, so that subscribers read the table now and not at the next event.
            // The marker needs a new number: with the missing number, it would hide the gap.
            let marker = {
                let mut last = sequence.lock();
                (messages.is_empty() && *last != self.last_sent).then(|| {
                    *last += 1;
                    *last
                })
            };
            if let Some(sequence) = marker {
                let content = Content::Committed(Kind::Seen, Vec::new());
                let marker = Outgoing { sequence, content };
                if let Err(reason) = self.publish(marker).await {
                    return SessionEnd::Lost(reason);
                }
            }
            if let Some(ended) = self.publish_until_idle(messages).await {
                return ended;
            }
        }
    }

    /// Publishes messages until none has arrived for [`CHECK_INTERVAL`].
    async fn publish_until_idle(
        &mut self,
        messages: &mut mpsc::Receiver<Outgoing>,
    ) -> Option<SessionEnd> {
        loop {
            match timeout(CHECK_INTERVAL, messages.recv()).await {
                Ok(None) => return Some(SessionEnd::Finished),
                Ok(Some(message)) => match self.publish(message).await {
                    Ok(()) => count("sent"),
                    Err(reason) => {
                        count("dropped");
                        return Some(SessionEnd::Lost(reason));
                    }
                },
                Err(_) if !self.connection.status().connected() => {
                    return Some(SessionEnd::Lost("the connection is closed".to_owned()));
                }
                Err(_) if !self.channel.status().connected() => {
                    return Some(SessionEnd::Lost("the channel is closed".to_owned()));
                }
                Err(_) => return None,
            }
        }
    }

    /// Publishes without a confirm: subscribers notice a lost message by its number.
    async fn publish(&mut self, message: Outgoing) -> Result<(), String> {
        let Outgoing { sequence, content } = message;
        let key = content.routing_key().into();
        let body = content.encode(self.source, sequence).map_err(|error| error.to_string())?;
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(TRANSIENT);
        let exchange = self.exchange.name.clone();
        let options = BasicPublishOptions::default();
        let published = self.channel.basic_publish(exchange, key, options, &body, properties);
        match timeout(RPC_TIMEOUT, published).await {
            // There is no confirm to wait for, because the channel is not in confirm mode.
            Ok(Ok(_)) => {
                self.last_sent = sequence;
                Ok(())
            }
            Ok(Err(error)) => Err(error.to_string()),
            // A broker that is short of memory or disk blocks the connection, for example.
            Err(_) => Err(format!("the broker accepted nothing for {RPC_TIMEOUT:?}")),
        }
    }
}

pub(crate) fn count(outcome: &'static str) {
    metrics::counter!("lastseen_event_messages_total", "outcome" => outcome).increment(1);
}
