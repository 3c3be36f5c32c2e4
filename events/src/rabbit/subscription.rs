//! A queue of one's own on the exchange.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use amqp::{Link, OutageLog, RPC_TIMEOUT, backoff};
use futures_util::StreamExt as _;
use lapin::Channel;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::sync::watch;
use tokio::time::timeout;

use super::{SessionError, declare, open};
use crate::exchange::Rabbit;
use crate::gap_detector::Sources;
use crate::message::Message;
use crate::{Kind, LinkStatus, Notice};

/// Messages that wait at the broker for a subscriber that is slow; then the oldest are dropped, which
/// it notices by their numbers.
const WAITING_MAX: i32 = 10_000;
const WAITING_BYTES_MAX: i32 = 64 << 20;
/// Messages that were delivered and not looked at: as many lie in our memory.
const PREFETCH: u16 = 64;
/// How often the binding is made sure of. If the exchange was deleted and made anew, it is without it,
/// and the broker does not say so.
const BIND_INTERVAL: Duration = Duration::from_secs(5);
const SETTLED: Duration = Duration::from_secs(5);

/// Hears what is told on the exchange, and reconnects for as long as it takes.
pub(crate) struct Subscription {
    rabbit: Arc<Rabbit>,
    name: String,
    session: Option<Session>,
    sources: Sources,
    /// What is told before anything else is heard.
    notices: VecDeque<Notice>,
    outage: OutageLog,
    waits: backon::ExponentialBackoff,
}

struct Session {
    connection: Link,
    channel: Channel,
    queue: ShortString,
    deliveries: lapin::Consumer,
    since: Instant,
    bound_at: Instant,
}

impl Subscription {
    pub(crate) fn new(rabbit: Arc<Rabbit>, name: &str) -> Self {
        Self {
            rabbit,
            name: name.to_owned(),
            session: None,
            sources: Sources::default(),
            notices: VecDeque::new(),
            outage: OutageLog::default(),
            waits: backoff(),
        }
    }

    pub(crate) async fn next(&mut self, status: &watch::Sender<LinkStatus>) -> Notice {
        loop {
            if let Some(notice) = self.notices.pop_front() {
                return notice;
            }
            let reason = match &mut self.session {
                Some(session) => match session.next(&self.rabbit).await {
                    Ok(delivery) => {
                        self.take(&delivery);
                        continue;
                    }
                    Err(reason) => reason,
                },
                None => match subscribe(&self.rabbit, &self.name).await {
                    Ok(session) => {
                        self.session = Some(session);
                        self.outage.up(&self.name);
                        _ = status.send_replace(Ok(()));
                        self.sources.forget();
                        return Notice::Missed("the subscription begins".to_owned());
                    }
                    Err(error) => error.to_string(),
                },
            };
            let session = self.session.take();
            if session.is_some_and(|session| session.since.elapsed() > SETTLED) {
                self.waits = backoff();
            }
            self.outage.down(&self.name, &reason);
            _ = status.send_replace(Err(reason));
            tokio::time::sleep(self.waits.next().unwrap_or(SETTLED)).await;
        }
    }

    fn take(&mut self, delivery: &lapin::message::Delivery) {
        let message = match Message::decode(&delivery.data) {
            Ok(message) => message,
            Err(error) => {
                tracing::debug!(%error, "an event cannot be read");
                let notice = Notice::Missed(format!("a message cannot be read: {error}"));
                return self.notices.push_back(notice);
            }
        };
        let Message { source, sequence, objects } = message;
        if !self.sources.follows(source, sequence) {
            let missed = format!("messages of {source} before its {sequence} are missing");
            self.notices.push_back(Notice::Missed(missed));
        }
        let key = delivery.routing_key.as_str();
        // A later version may tell more kinds, which are not for us, but have numbers, too.
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == key);
        if let Some(kind) = kind.filter(|_| !objects.is_empty()) {
            self.notices.push_back(Notice::Committed(kind, objects));
        }
    }
}

/// Everything on the exchange, into a queue that goes with our connection. It has a new name each
/// time: the one before may still be there.
async fn subscribe(rabbit: &Rabbit, name: &str) -> Result<Session, SessionError> {
    let (connection, channel) = open(rabbit, name).await?;
    let queue: ShortString = format!("{}.{:07x}", rabbit.name, rand::random::<u32>() >> 4).into();
    let subscribing = async {
        let ours = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
        let mut bounds = FieldTable::default();
        bounds.insert("x-max-length".into(), AMQPValue::LongInt(WAITING_MAX));
        bounds.insert("x-max-length-bytes".into(), AMQPValue::LongInt(WAITING_BYTES_MAX));
        channel.queue_declare(queue.clone(), ours, bounds).await?;
        bind(rabbit, &channel, &queue).await?;
        // Acked one by one: without acks, lapin would keep all that comes, without a bound.
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        channel.basic_consume(queue.clone(), "".into(), options, arguments).await
    };
    let deliveries = timeout(RPC_TIMEOUT, subscribing).await?.map_err(SessionError::Subscribe)?;
    let since = Instant::now();
    Ok(Session { connection, channel, queue, deliveries, since, bound_at: since })
}

async fn bind(rabbit: &Rabbit, channel: &Channel, queue: &ShortString) -> lapin::Result<()> {
    let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(queue.clone(), rabbit.name.clone(), "#".into(), options, arguments).await
}

impl Session {
    /// The next message, or why there will be none by this session.
    async fn next(&mut self, rabbit: &Rabbit) -> Result<lapin::message::Delivery, String> {
        loop {
            if self.bound_at.elapsed() > BIND_INTERVAL {
                self.see_to_the_binding(rabbit).await.map_err(|error| error.to_string())?;
            }
            // The stream can fall silent without an end, so the connection is looked at as well.
            match timeout(Duration::from_secs(1), self.deliveries.next()).await {
                Ok(Some(Ok(delivery))) => {
                    let acked = timeout(RPC_TIMEOUT, delivery.ack(BasicAckOptions::default()));
                    return match acked.await {
                        Ok(Ok(true)) => Ok(delivery),
                        Ok(Ok(false)) => Err("the channel is lost".to_owned()),
                        Ok(Err(error)) => Err(error.to_string()),
                        Err(late) => Err(late.to_string()),
                    };
                }
                Ok(Some(Err(error))) => return Err(error.to_string()),
                Ok(None) => return Err("the broker cancelled the subscription".to_owned()),
                Err(_) if !self.connection.status().connected() => {
                    return Err("the connection is closed".to_owned());
                }
                Err(_) if !self.channel.status().connected() => {
                    return Err("the channel is closed".to_owned());
                }
                Err(_) => {}
            }
        }
    }

    async fn see_to_the_binding(&mut self, rabbit: &Rabbit) -> Result<(), SessionError> {
        declare(rabbit, &self.channel).await?;
        let bound = timeout(RPC_TIMEOUT, bind(rabbit, &self.channel, &self.queue)).await?;
        bound.map_err(SessionError::Subscribe)?;
        self.bound_at = Instant::now();
        Ok(())
    }
}
