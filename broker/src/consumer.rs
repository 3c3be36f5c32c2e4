//! Taking messages from the queue.

use tokio::sync::watch;

use crate::delivery::Delivery;
use crate::publisher::{Kind, Publisher};
use crate::{LinkStatus, amqp, delivery, sqlite};

/// A consumer of the queue.
pub struct Consumer(Inner);

enum Inner {
    Amqp(Box<amqp::Consumer>),
    Sqlite(sqlite::Consumer),
}

impl Consumer {
    /// A consumer that takes up to `prefetch` unsettled deliveries of the queue that `publisher`
    /// publishes to, by which its retries and dead letters go out. RabbitMQ's management page shows
    /// its connection, a second one, as `name`; it is opened with the first [`Consumer::next`].
    #[must_use]
    pub fn new(publisher: &Publisher, name: &str, prefetch: u16) -> Self {
        metrics::describe_counter!("lastseen_deliveries_total", "Messages taken from the queue.");
        metrics::describe_counter!(
            "lastseen_settled_total",
            "Deliveries by how they were settled; lost ones are delivered again."
        );
        for redelivered in ["false", "true"] {
            metrics::counter!("lastseen_deliveries_total", "redelivered" => redelivered)
                .increment(0);
        }
        for disposition in ["ack", "retry", "requeue", "dead_letter", "lost"] {
            metrics::counter!("lastseen_settled_total", "disposition" => disposition).increment(0);
        }
        Self(match &publisher.kind {
            Kind::Amqp(publisher) => {
                Inner::Amqp(Box::new(amqp::Consumer::new(name, prefetch, publisher.clone())))
            }
            Kind::Sqlite(queue) => Inner::Sqlite(sqlite::Consumer::new(queue, prefetch)),
        })
    }

    /// Whether the broker gives messages right now.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        match &self.0 {
            Inner::Amqp(consumer) => consumer.status(),
            Inner::Sqlite(consumer) => consumer.status(),
        }
    }

    // Decision: docs/decisions/0022-why-are-deliveries-pulled.md
    /// The next delivery, however long the broker is away. Nothing is lost when this is dropped.
    pub async fn next(&mut self) -> Delivery {
        let delivery = match &mut self.0 {
            Inner::Amqp(consumer) => {
                Delivery(delivery::Inner::Amqp(Box::new(consumer.next().await)))
            }
            Inner::Sqlite(consumer) => Delivery(delivery::Inner::Sqlite(consumer.next().await)),
        };
        let redelivered = if delivery.redelivered() { "true" } else { "false" };
        metrics::counter!("lastseen_deliveries_total", "redelivered" => redelivered).increment(1);
        delivery
    }

    /// From now on takes up to `prefetch` unsettled deliveries. If that is less than before, what was taken
    /// ahead and not begun is given back, and those in flight come on top of it on a RabbitMQ.
    pub async fn set_prefetch(&mut self, prefetch: u16) {
        match &mut self.0 {
            Inner::Amqp(consumer) => consumer.set_prefetch(prefetch).await,
            Inner::Sqlite(consumer) => consumer.set_prefetch(prefetch),
        }
    }

    /// Takes no more, and gives back at once what was taken ahead and not begun, so that another
    /// consumer can have it. Deliveries in flight can still be settled until [`Consumer::close`].
    pub async fn stop(&mut self) {
        match &mut self.0 {
            Inner::Amqp(consumer) => consumer.stop().await,
            Inner::Sqlite(consumer) => consumer.stop(),
        }
    }

    /// Ends it. What is not settled by now is delivered again.
    pub async fn close(self) {
        if let Inner::Amqp(consumer) = self.0 {
            consumer.close().await;
        }
    }
}
