//! The task behind an emitter.

use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use amqp::{Link, OutageLog, RPC_TIMEOUT, backoff};
use lapin::options::BasicPublishOptions;
use lapin::{BasicProperties, Channel};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use uuid::Uuid;

use crate::exchange::Rabbit;
use crate::message::Message;
use crate::{Kind, LinkStatus, Object};

/// How often the connection is looked at while there is nothing to tell.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// A session that lasted so long was a good one: the next is tried for without further waiting.
const SETTLED: Duration = Duration::from_secs(5);
const TRANSIENT: u8 = 1;

/// A message that has its number, and is not written yet.
pub(crate) struct Outgoing {
    pub(crate) kind: Kind,
    pub(crate) sequence: u64,
    pub(crate) objects: Vec<Object>,
}

/// The last number that was given to a message, whatever has become of that.
#[derive(Clone, Default)]
pub(crate) struct Numbers(Arc<Mutex<u64>>);

impl Numbers {
    pub(crate) fn lock(&self) -> MutexGuard<'_, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is to be sent.
pub(crate) struct Outbound {
    pub(crate) waiting: mpsc::Receiver<Outgoing>,
    pub(crate) numbers: Numbers,
}

/// Why a session is over.
enum Ended {
    Finished,
    Lost(String),
}

/// Sends what comes until nobody tells any more. While the broker is away, what comes is dropped.
pub(crate) async fn send(
    rabbit: Arc<Rabbit>,
    name: String,
    mut outbound: Outbound,
    status: watch::Sender<LinkStatus>,
) {
    let source = Uuid::now_v7();
    let mut outage = OutageLog::default();
    let mut waits = backoff();
    let mut wait = Duration::ZERO;
    let mut sent = 0;
    loop {
        let opened = async {
            tokio::time::sleep(wait).await;
            super::open(&rabbit, &name).await
        };
        let Some(opened) = dropping(&mut outbound.waiting, opened).await else { return };
        let reason = match opened {
            Err(error) => error.to_string(),
            Ok((connection, channel)) => {
                outage.up(&name);
                _ = status.send_replace(Ok(()));
                let since = Instant::now();
                let mut session = Session { rabbit: &rabbit, source, connection, channel, sent };
                let ended = session.serve(&mut outbound).await;
                sent = session.sent;
                match ended {
                    Ended::Finished => return amqp::close(&session.connection).await,
                    Ended::Lost(reason) => {
                        if since.elapsed() > SETTLED {
                            waits = backoff();
                        }
                        reason
                    }
                }
            }
        };
        outage.down(&name, &reason);
        _ = status.send_replace(Err(reason));
        wait = waits.next().unwrap_or(wait);
    }
}

/// Awaits `opening` and drops what comes meanwhile. `None` when nobody tells any more.
async fn dropping<T>(
    waiting: &mut mpsc::Receiver<Outgoing>,
    opening: impl Future<Output = T>,
) -> Option<T> {
    let mut opening = pin!(opening);
    loop {
        tokio::select! {
            opened = &mut opening => return Some(opened),
            message = waiting.recv() => {
                drop(message?);
                count("dropped");
            }
        }
    }
}

struct Session<'a> {
    rabbit: &'a Rabbit,
    source: Uuid,
    connection: Link,
    channel: Channel,
    /// The last number that was sent, also by a session before.
    sent: u64,
}

impl Session<'_> {
    async fn serve(&mut self, outbound: &mut Outbound) -> Ended {
        let Outbound { waiting, numbers } = outbound;
        loop {
            // What waits shows the gap by its numbers. If nothing waits, a message without objects
            // shows it, so that subscribers check the table now and not at the next event. It gets a
            // number of its own: with the number that is missing, it would hide the gap.
            let mark = {
                let mut last = numbers.lock();
                (waiting.is_empty() && *last != self.sent).then(|| {
                    *last += 1;
                    *last
                })
            };
            if let Some(sequence) = mark {
                let mark = Outgoing { kind: Kind::Seen, sequence, objects: Vec::new() };
                if let Err(reason) = self.publish(mark).await {
                    return Ended::Lost(reason);
                }
            }
            if let Some(ended) = self.send_until_idle(waiting).await {
                return ended;
            }
        }
    }

    /// Sends what comes until there was nothing for a while.
    async fn send_until_idle(&mut self, waiting: &mut mpsc::Receiver<Outgoing>) -> Option<Ended> {
        loop {
            match timeout(LOOK_INTERVAL, waiting.recv()).await {
                Ok(None) => return Some(Ended::Finished),
                Ok(Some(message)) => match self.publish(message).await {
                    Ok(()) => count("sent"),
                    Err(reason) => {
                        count("dropped");
                        return Some(Ended::Lost(reason));
                    }
                },
                Err(_) if !self.connection.status().connected() => {
                    return Some(Ended::Lost("the connection is closed".to_owned()));
                }
                Err(_) if !self.channel.status().connected() => {
                    return Some(Ended::Lost("the channel is closed".to_owned()));
                }
                Err(_) => return None,
            }
        }
    }

    /// Without a confirm: what is lost now is missed by its number.
    async fn publish(&mut self, message: Outgoing) -> Result<(), String> {
        let Outgoing { kind, sequence, objects } = message;
        let body = Message { source: self.source, sequence, objects }.encode();
        let body = body.map_err(|error| error.to_string())?;
        let properties = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_delivery_mode(TRANSIENT);
        let (exchange, key) = (self.rabbit.name.clone(), kind.name().into());
        let options = BasicPublishOptions::default();
        let published = self.channel.basic_publish(exchange, key, options, &body, properties);
        match timeout(RPC_TIMEOUT, published).await {
            // Its confirm is none, since the channel has no confirms.
            Ok(Ok(_)) => {
                self.sent = sequence;
                Ok(())
            }
            Ok(Err(error)) => Err(error.to_string()),
            // As when the broker has blocked the connection, being short of memory or disk.
            Err(_) => Err(format!("the broker took nothing for {RPC_TIMEOUT:?}")),
        }
    }
}

pub(crate) fn count(outcome: &'static str) {
    metrics::counter!("lastseen_event_messages_total", "outcome" => outcome).increment(1);
}
