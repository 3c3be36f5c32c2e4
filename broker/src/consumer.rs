//! Receives deliveries from the queue.

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
    /// Creates a consumer of the queue that `publisher` publishes to, with up to `prefetch`
    /// unsettled deliveries. It publishes retries and dead letters through `publisher`. The first
    /// [`Consumer::next`] opens a second connection, which RabbitMQ's management page shows as
    /// `name`.
    #[must_use]
    pub fn new(publisher: &Publisher, name: &str, prefetch: u16) -> Self {
        metrics::describe_counter!("lastseen_deliveries_total", "Deliveries from the queue.");
        metrics::describe_counter!(
            "lastseen_settled_total",
            "Deliveries by disposition; lost ones are delivered again."
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

    /// Whether the broker delivers messages now.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<LinkStatus> {
        match &self.0 {
            Inner::Amqp(consumer) => consumer.status(),
            Inner::Sqlite(consumer) => consumer.status(),
        }
    }

    // Decision: docs/decisions/0022-why-are-deliveries-pulled.md
    /// Waits for the next delivery, and reconnects until it succeeds. Dropping the future loses no
    /// message.
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

    /// Changes the limit on unsettled deliveries. A smaller limit gives prefetched deliveries back
    /// to the queue; on RabbitMQ, deliveries in flight do not count towards it.
    pub async fn set_prefetch(&mut self, prefetch: u16) {
        match &mut self.0 {
            Inner::Amqp(consumer) => consumer.set_prefetch(prefetch).await,
            Inner::Sqlite(consumer) => consumer.set_prefetch(prefetch),
        }
    }

    /// Stops receiving deliveries, and gives prefetched ones back to the queue at once for other
    /// consumers. Deliveries in flight can still be settled until [`Consumer::close`].
    pub async fn stop(&mut self) {
        match &mut self.0 {
            Inner::Amqp(consumer) => consumer.stop().await,
            Inner::Sqlite(consumer) => consumer.stop(),
        }
    }

    /// Closes the connection. Unsettled deliveries are delivered again.
    pub async fn close(self) {
        if let Inner::Amqp(consumer) = self.0 {
            consumer.close().await;
        }
    }
}
