//! A subscription: a queue of its own that is bound to the exchange.

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
use crate::exchange::TopicExchange;
use crate::gap_detector::GapDetector;
use crate::message::Message;
use crate::{Kind, LinkStatus, Notification};

/// Messages that wait at the broker for a slow subscriber. Beyond this, the broker drops the
/// oldest, which the subscriber notices by their numbers.
const WAITING_MAX: i32 = 10_000;
const WAITING_BYTES_MAX: i32 = 64 << 20;
/// Limits the delivered messages in this process's memory.
const PREFETCH: u16 = 64;
/// How often the queue is bound again. An exchange that was deleted and declared again has lost its
/// bindings, and the broker does not report that.
const BIND_INTERVAL: Duration = Duration::from_secs(5);
/// A session that lasted longer resets the backoff.
const STABLE_AFTER: Duration = Duration::from_secs(5);

/// Receives the events of the exchange, and reconnects until it succeeds.
pub(crate) struct Subscription {
    exchange: Arc<TopicExchange>,
    name: String,
    session: Option<Session>,
    gaps: GapDetector,
    /// Notifications to return before the next message is read.
    pending: VecDeque<Notification>,
    outage: OutageLog,
    delays: backon::ExponentialBackoff,
}

struct Session {
    connection: Link,
    channel: Channel,
    queue: ShortString,
    deliveries: lapin::Consumer,
    opened_at: Instant,
    bound_at: Instant,
}

impl Subscription {
    pub(crate) fn new(exchange: Arc<TopicExchange>, name: &str) -> Self {
        Self {
            exchange,
            name: name.to_owned(),
            session: None,
            gaps: GapDetector::default(),
            pending: VecDeque::new(),
            outage: OutageLog::default(),
            delays: backoff(),
        }
    }

    pub(crate) async fn next(&mut self, status: &watch::Sender<LinkStatus>) -> Notification {
        loop {
            if let Some(notification) = self.pending.pop_front() {
                return notification;
            }
            let reason = match &mut self.session {
                Some(session) => match session.next(&self.exchange).await {
                    Ok(delivery) => {
                        self.receive(&delivery);
                        continue;
                    }
                    Err(reason) => reason,
                },
                None => match subscribe(&self.exchange, &self.name).await {
                    Ok(session) => {
                        self.session = Some(session);
                        self.outage.up(&self.name);
                        _ = status.send_replace(Ok(()));
                        self.gaps.forget();
                        return Notification::Missed("the subscription begins".to_owned());
                    }
                    Err(error) => error.to_string(),
                },
            };
            let session = self.session.take();
            if session.is_some_and(|session| session.opened_at.elapsed() > STABLE_AFTER) {
                self.delays = backoff();
            }
            self.outage.down(&self.name, &reason);
            _ = status.send_replace(Err(reason));
            tokio::time::sleep(self.delays.next().unwrap_or(STABLE_AFTER)).await;
        }
    }

    fn receive(&mut self, delivery: &lapin::message::Delivery) {
        let message = match Message::decode(&delivery.data) {
            Ok(message) => message,
            Err(error) => {
                tracing::debug!(%error, "cannot decode an event; it counts as missed");
                let missed = Notification::Missed(format!("cannot decode an event: {error}"));
                return self.pending.push_back(missed);
            }
        };
        let Message { source, sequence, objects } = message;
        if !self.gaps.record(source, sequence) {
            let missed =
                format!("messages of source {source} before number {sequence} are missing");
            self.pending.push_back(Notification::Missed(missed));
        }
        let key = delivery.routing_key.as_str();
        // A later version may publish other kinds. They are ignored, but their numbers count.
        let kind = Kind::ALL.into_iter().find(|kind| kind.name() == key);
        if let Some(kind) = kind.filter(|_| !objects.is_empty()) {
            self.pending.push_back(Notification::Committed(kind, objects));
        }
    }
}

/// Binds a new queue to all events of the exchange. The broker deletes the queue with the
/// connection. Its name is new each time, because the previous queue may still exist.
async fn subscribe(exchange: &TopicExchange, name: &str) -> Result<Session, SessionError> {
    let (connection, channel) = open(exchange, name).await?;
    let queue: ShortString = format!("{}.{:07x}", exchange.name, rand::random::<u32>() >> 4).into();
    let subscribing = async {
        let exclusive =
            QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
        let mut bounds = FieldTable::default();
        bounds.insert("x-max-length".into(), AMQPValue::LongInt(WAITING_MAX));
        bounds.insert("x-max-length-bytes".into(), AMQPValue::LongInt(WAITING_BYTES_MAX));
        channel.queue_declare(queue.clone(), exclusive, bounds).await?;
        bind(exchange, &channel, &queue).await?;
        // With acks, the prefetch bounds the deliveries; without them, lapin would buffer all
        // messages.
        channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
        let (options, arguments) = (BasicConsumeOptions::default(), FieldTable::default());
        channel.basic_consume(queue.clone(), "".into(), options, arguments).await
    };
    let deliveries = timeout(RPC_TIMEOUT, subscribing).await?.map_err(SessionError::Subscribe)?;
    let now = Instant::now();
    Ok(Session { connection, channel, queue, deliveries, opened_at: now, bound_at: now })
}

async fn bind(
    exchange: &TopicExchange,
    channel: &Channel,
    queue: &ShortString,
) -> lapin::Result<()> {
    let (options, arguments) = (QueueBindOptions::default(), FieldTable::default());
    channel.queue_bind(queue.clone(), exchange.name.clone(), "#".into(), options, arguments).await
}

impl Session {
    /// Returns the next message, or the reason why the session has ended.
    async fn next(&mut self, exchange: &TopicExchange) -> Result<lapin::message::Delivery, String> {
        loop {
            if self.bound_at.elapsed() > BIND_INTERVAL {
                self.bind_again(exchange).await.map_err(|error| error.to_string())?;
            }
            // The stream can stop without ending, so check the connection each second as well.
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

    async fn bind_again(&mut self, exchange: &TopicExchange) -> Result<(), SessionError> {
        declare(exchange, &self.channel).await?;
        let bound = timeout(RPC_TIMEOUT, bind(exchange, &self.channel, &self.queue)).await?;
        bound.map_err(SessionError::Subscribe)?;
        self.bound_at = Instant::now();
        Ok(())
    }
}
