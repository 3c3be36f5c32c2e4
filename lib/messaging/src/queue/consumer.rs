//! Receives deliveries from the queue.

use runtime::Status;
use tokio::sync::watch;

use crate::queue::delivery::Delivery;
use crate::queue::publisher::{Kind, Publisher};
use crate::queue::{amqp, delivery, sqlite};

/// A consumer of the queue.
pub struct Consumer(Inner);

/// How many unsettled deliveries a consumer takes, in messages.
#[derive(Clone, Copy, Debug)]
pub struct Prefetch {
    /// Those that the caller works on.
    pub in_work: u16,
    /// Those that wait for it.
    pub waiting: u16,
}

impl Prefetch {
    /// The limit on all unsettled deliveries.
    #[must_use]
    pub fn total(self) -> u16 {
        self.in_work.saturating_add(self.waiting)
    }

    /// The share of one of `queues` queues. Each queue alone may keep the caller busy, so only the
    /// waiting deliveries are divided.
    pub(crate) fn of_each(self, queues: usize) -> u16 {
        let waiting = usize::from(self.waiting) / queues.max(1);
        self.in_work.saturating_add(u16::try_from(waiting).unwrap_or(self.waiting))
    }
}

impl From<u16> for Prefetch {
    fn from(in_work: u16) -> Self {
        Self { in_work, waiting: 0 }
    }
}

enum Inner {
    Amqp(Box<amqp::Consumer>),
    Sqlite(sqlite::Consumer),
}

impl Consumer {
    /// Creates a consumer of the queue that `publisher` publishes to, with up to `prefetch`
    /// unsettled deliveries; with shards, RabbitMQ may send more, which wait in a buffer. The consumer publishes retries and dead letters through `publisher`.
    /// The first [`Consumer::next`] opens the consumer's own connection, which RabbitMQ's
    /// management page shows as `name`.
    #[must_use]
    pub fn new(publisher: &Publisher, name: &str, prefetch: impl Into<Prefetch>) -> Self {
        let prefetch = prefetch.into();
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
            Kind::Sqlite(queue) => Inner::Sqlite(sqlite::Consumer::new(queue, prefetch.total())),
        })
    }

    /// Whether the broker delivers messages now.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Status> {
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
    /// to the queue. On RabbitMQ, deliveries in flight do not count towards a smaller limit.
    pub async fn set_prefetch(&mut self, prefetch: impl Into<Prefetch>) {
        let prefetch = prefetch.into();
        match &mut self.0 {
            Inner::Amqp(consumer) => consumer.set_prefetch(prefetch).await,
            Inner::Sqlite(consumer) => consumer.set_prefetch(prefetch.total()),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_waiting_deliveries_are_divided_among_the_queues() {
        let prefetch = Prefetch { in_work: 200, waiting: 4_000 };
        assert_eq!((prefetch.total(), prefetch.of_each(1)), (4_200, 4_200));
        assert_eq!(prefetch.of_each(33), 321);
        assert_eq!(Prefetch::from(10).of_each(33), 10);
    }
}
