//! A subscription: a queue of its own that is bound to the exchange.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use lapin::Channel;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicQosOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use tokio::sync::watch;
use tokio::time::timeout;

use super::topic_exchange::TopicExchange;
use crate::amqp::{Connection, Reconnector, SessionError, within_deadline};
use crate::events::change::Notification;
use crate::events::gap_detector::GapDetector;
use crate::events::message::{Content, Message};
use runtime::Status;

/// The most messages that wait at the broker for a slow subscriber. Beyond this, the broker drops
/// the oldest. The subscriber notices the missing numbers.
const WAITING_MAX: i32 = 10_000;
const WAITING_BYTES_MAX: i32 = 64 << 20;
/// Limits the delivered messages in this process's memory.
const PREFETCH: u16 = 64;
/// How often the queue is bound again. An exchange that was deleted and declared again has lost its
/// bindings, and the broker does not report that.
const BIND_INTERVAL: Duration = Duration::from_secs(5);

/// Receives the events of the exchange, and reconnects until it succeeds.
pub(crate) struct Subscription {
    exchange: Arc<TopicExchange>,
    reconnector: Reconnector,
    session: Option<Session>,
    gaps: GapDetector,
    /// Notifications to return before the next message is read.
    pending: VecDeque<Notification>,
}

struct Session {
    connection: Connection,
    channel: Channel,
    queue: ShortString,
    deliveries: lapin::Consumer,
    bound_at: Instant,
}

impl Subscription {
    pub(crate) fn new(exchange: Arc<TopicExchange>, name: &str) -> Self {
        Self {
            reconnector: Reconnector::new(exchange.access.clone(), name),
            exchange,
            session: None,
            gaps: GapDetector::default(),
            pending: VecDeque::new(),
        }
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.reconnector.status()
    }

    pub(crate) async fn next(&mut self) -> Notification {
        loop {
            if let Some(notification) = self.pending.pop_front() {
                return notification;
            }
            let Some(session) = &mut self.session else {
                let exchange = &self.exchange;
                let subscribe = |connection| subscribe(connection, exchange);
                self.session = Some(self.reconnector.open(subscribe).await);
                self.gaps.forget();
                return Notification::Missed("the subscription begins".to_owned());
            };
            match session.next(&self.exchange).await {
                Ok(delivery) => self.receive(&delivery),
                Err(reason) => {
                    self.session = None;
                    self.reconnector.mark_closed(reason);
                }
            }
        }
    }

    fn receive(&mut self, delivery: &lapin::message::Delivery) {
        let message = match Message::decode(delivery.routing_key.as_str(), &delivery.data) {
            Ok(message) => message,
            Err(error) => {
                tracing::debug!(%error, "cannot decode an event; it counts as missed");
                let missed = Notification::Missed(format!("cannot decode an event: {error}"));
                return self.pending.push_back(missed);
            }
        };
        let Message { source, sequence, content } = message;
        if !self.gaps.record(source, sequence) {
            let missed =
                format!("messages of source {source} before number {sequence} are missing");
            self.pending.push_back(Notification::Missed(missed));
        }
        match content {
            Some(Content::Committed(kind, objects)) if !objects.is_empty() => {
                self.pending.push_back(Notification::Committed(kind, objects));
            }
            Some(Content::GivenUp(objects)) if !objects.is_empty() => {
                self.pending.push_back(Notification::GivenUp(objects));
            }
            _ => {}
        }
    }
}

/// Binds a new queue to all events of the exchange. The broker deletes the queue with the
/// connection. Its name is new each time, because the previous queue may still exist.
async fn subscribe(
    connection: Connection,
    exchange: &TopicExchange,
) -> Result<Session, SessionError> {
    let channel = exchange.open(&connection).await?;
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
    let deliveries = subscribing.await.map_err(SessionError::Consume)?;
    Ok(Session { connection, channel, queue, deliveries, bound_at: Instant::now() })
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
                within_deadline(self.bind_again(exchange)).await?;
            }
            // The stream can stop without ending, so check the connection each second as well.
            match timeout(Duration::from_secs(1), self.deliveries.next()).await {
                Ok(Some(Ok(delivery))) => {
                    let acked = within_deadline(delivery.ack(BasicAckOptions::default())).await?;
                    return acked.then_some(delivery).ok_or("the channel is lost".to_owned());
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
        exchange.declare(&self.channel).await?;
        let bound = bind(exchange, &self.channel, &self.queue).await;
        bound.map_err(SessionError::Consume)?;
        self.bound_at = Instant::now();
        Ok(())
    }
}
