//! The queue of a test, and helpers for it.

use std::path::Path;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use messaging::queue::{
    Broker, Config, Consumer, DeadLetter, DeadLetterAction, Delivery, Depths, Disposition,
    Inspector, Publisher, QueueConfig, QueueType, Selection, Settled,
};
use runtime::{Status, Supervisor};
use testkit::{Queue, Scratch, eventually};
use tokio::time::timeout;

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough to notice an event that must not happen.
pub(crate) const QUIET_TIME: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    Quorum,
    Classic,
    File,
}

/// An empty queue. Dropping it deletes the queue or its file.
pub(crate) struct TestQueue {
    pub(crate) config: Config,
    _queue: Option<Queue>,
    _folder: Option<Scratch>,
}

impl TestQueue {
    pub(crate) fn new(backend: Backend) -> Self {
        let queue_type = match backend {
            Backend::Quorum => QueueType::Quorum,
            Backend::Classic => QueueType::Classic,
            Backend::File => {
                let folder = Scratch::new("queue");
                let config = file_config(&folder.path().join("queue.db"));
                return Self { config, _queue: None, _folder: Some(folder) };
            }
        };
        let queue = Queue::new();
        Self { config: amqp_config(&queue, queue_type), _queue: Some(queue), _folder: None }
    }

    /// A queue with one message for each of `ids`, and a publisher.
    pub(crate) async fn with(backend: Backend, ids: &[i64]) -> (Self, Publisher) {
        let queue = Self::new(backend);
        let publisher = queue.open().await;
        publisher.publish_ids("c", ids, PATIENCE).await.unwrap();
        (queue, publisher)
    }

    /// Starts a publisher and waits until it is connected. It creates the queue if necessary.
    pub(crate) async fn open(&self) -> Publisher {
        connected(&self.config).await
    }

    /// Makes a dead letter of each id, with its reason.
    pub(crate) async fn add_dead_letters(&self, letters: &[(i64, &str)]) {
        let publisher = self.open().await;
        let ids: Vec<i64> = letters.iter().map(|(id, _)| *id).collect();
        publisher.publish_ids("callback", &ids, PATIENCE).await.unwrap();
        let mut consumer = consumer(&publisher, 100);
        for _ in letters {
            let delivery = next(&mut consumer).await;
            let (_, reason) = letters.iter().find(|(id, _)| *id == delivery.id().unwrap()).unwrap();
            assert_eq!(delivery.settle(dead(reason)).await, Settled::Done);
        }
        consumer.close().await;
        publisher.close().await;
    }

    pub(crate) async fn depths(&self) -> Depths {
        let mut inspector = Inspector::open(&self.config).await.unwrap();
        let depths = inspector.depths().await.unwrap();
        inspector.close().await;
        depths
    }

    /// Waits until the queue has these depths.
    pub(crate) async fn wait_for_depths(&self, ready: u64, delayed: u64, dead: u64) {
        let expected = Depths { ready, delayed, dead };
        eventually(&format!("{expected:?}"), PATIENCE, async || {
            (self.depths().await == expected).then_some(())
        })
        .await;
    }

    /// Closes the consumer, and waits until the queue is empty.
    pub(crate) async fn ends_empty(&self, consumer: Consumer) {
        consumer.close().await;
        self.wait_for_depths(0, 0, 0).await;
    }

    pub(crate) async fn process(
        &self,
        selection: &Selection,
        action: DeadLetterAction,
    ) -> Vec<DeadLetter> {
        process_dead_letters(&self.config, selection, action).await
    }

    /// Lists all dead letters.
    pub(crate) async fn letters(&self) -> Vec<DeadLetter> {
        process_all(&self.config, DeadLetterAction::List).await
    }
}

/// Applies `action` to the selected dead letters, and returns them.
pub(crate) async fn process_dead_letters(
    config: &Config,
    selection: &Selection,
    action: DeadLetterAction,
) -> Vec<DeadLetter> {
    let mut inspector = Inspector::open(config).await.unwrap();
    let mut letters = Vec::new();
    let on_done = |letter| letters.push(letter);
    inspector.dead_letters(selection, action, on_done).await.unwrap();
    inspector.close().await;
    letters
}

/// Applies `action` to all dead letters, and returns them.
pub(crate) async fn process_all(config: &Config, action: DeadLetterAction) -> Vec<DeadLetter> {
    process_dead_letters(config, &Selection::default(), action).await
}

pub(crate) fn config_at(uri: &str, queue_name: &str, queue_type: QueueType) -> Config {
    let queue =
        QueueConfig { queue_name: queue_name.to_owned(), queue_type, shards: 1, amqp_ca: None };
    Config { amqp_uri: uri.parse().unwrap(), queue }
}

/// Settings of the queue in the file at `path`.
pub(crate) fn file_config(path: &Path) -> Config {
    config_at(&format!("sqlite:{}", path.display()), "unused", QueueType::Quorum)
}

pub(crate) fn amqp_config(queue: &Queue, queue_type: QueueType) -> Config {
    config_at(&testkit::amqp_uri(), &queue.name, queue_type)
}

pub(crate) async fn connected(config: &Config) -> Publisher {
    connected_to(config.open(&Supervisor::default()).unwrap()).await
}

pub(crate) async fn connected_to(broker: Broker) -> Publisher {
    let publisher = Publisher::start(broker, "test publisher");
    let mut status = publisher.status();
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    publisher
}

/// Starts a publisher, and waits until its status is an error that contains `reason`.
pub(crate) async fn refused(config: &Config, reason: &str) -> Publisher {
    let publisher = Publisher::start(config.open(&Supervisor::default()).unwrap(), "test");
    let mut status = publisher.status();
    let is_reason = |status: &Status| status.as_ref().is_err_and(|it| it.contains(reason));
    timeout(PATIENCE, status.wait_for(is_reason)).await.expect(reason).unwrap();
    publisher
}

pub(crate) fn consumer(publisher: &Publisher, prefetch: u16) -> Consumer {
    Consumer::new(publisher, "test consumer", prefetch)
}

pub(crate) async fn next(consumer: &mut Consumer) -> Delivery {
    timeout(PATIENCE, consumer.next()).await.expect("a delivery should arrive")
}

/// Receives the next `count` deliveries.
pub(crate) async fn take(consumer: &mut Consumer, count: usize) -> Vec<Delivery> {
    let mut deliveries = Vec::new();
    for _ in 0..count {
        deliveries.push(next(consumer).await);
    }
    deliveries
}

/// Receives and acks the next `count` deliveries one by one, and returns their ids.
pub(crate) async fn ack_next(consumer: &mut Consumer, count: usize) -> Vec<i64> {
    let mut ids = Vec::new();
    for _ in 0..count {
        let delivery = next(consumer).await;
        ids.push(delivery.id().unwrap());
        assert_eq!(delivery.settle(Disposition::Ack).await, Settled::Done);
    }
    ids
}

pub(crate) fn retry(reason: &str) -> Disposition {
    Disposition::Retry { reason: reason.to_owned(), after: None }
}

pub(crate) fn dead(reason: &str) -> Disposition {
    Disposition::DeadLetter { reason: reason.to_owned() }
}

pub(crate) fn ids(letters: &[DeadLetter]) -> Vec<i64> {
    letters.iter().map(|letter| letter.id.unwrap()).collect()
}

/// Polls `future` up to `polls` times. Returns its output, or drops it.
pub(crate) async fn poll_times<T>(polls: u32, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let mut left = polls;
    std::future::poll_fn(move |context| match future.as_mut().poll(context) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending if left == 0 => Poll::Ready(None),
        Poll::Pending => {
            left -= 1;
            Poll::Pending
        }
    })
    .await
}
