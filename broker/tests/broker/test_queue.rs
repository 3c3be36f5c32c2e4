//! Where a test's queue lies, and what tests do with it.

use std::path::Path;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use broker::{
    BrokerUrl, Config, Consumer, DeadLetter, Delivery, Depths, Disposition, Inspector, Publisher,
    QueueConfig, QueueType, Selection, Settled, Treatment,
};
use testbed::{Queue, Scratch, eventually};
use tokio::time::timeout;

pub(crate) const SECOND: Duration = Duration::from_secs(1);
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// Long enough for what must not happen to have happened, if it could.
pub(crate) const A_WHILE: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    Quorum,
    Classic,
    File,
}

/// An empty queue of the test's own; what it lies in goes with it.
pub(crate) struct Place {
    pub(crate) config: Config,
    _queue: Option<Queue>,
    _folder: Option<Scratch>,
}

impl Place {
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

    /// A publisher that is ready to publish. It opens the queue, if it is not open.
    pub(crate) async fn open(&self) -> Publisher {
        connected(&self.config).await
    }

    /// Has a message for each of `letters` published and given up for its reason.
    pub(crate) async fn bury(&self, letters: &[(i64, &str)]) {
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

    /// Waits until that many are ready, delayed and dead.
    pub(crate) async fn holds(&self, ready: u64, delayed: u64, dead: u64) {
        let expected = Depths { ready, delayed, dead };
        eventually(&format!("{expected:?}"), PATIENCE, async || {
            (self.depths().await == expected).then_some(())
        })
        .await;
    }

    pub(crate) async fn treat(
        &self,
        selection: &Selection,
        treatment: Treatment,
    ) -> Vec<DeadLetter> {
        treat(&self.config, selection, treatment).await
    }

    /// All dead letters.
    pub(crate) async fn letters(&self) -> Vec<DeadLetter> {
        self.treat(&Selection::default(), Treatment::Look).await
    }

    /// The objects of all dead letters.
    pub(crate) async fn dead_ids(&self) -> Vec<i64> {
        ids(&self.letters().await)
    }
}

pub(crate) async fn treat(
    config: &Config,
    selection: &Selection,
    treatment: Treatment,
) -> Vec<DeadLetter> {
    let mut inspector = Inspector::open(config).await.unwrap();
    let mut letters = Vec::new();
    let treated = |letter| letters.push(letter);
    inspector.dead_letters(selection, treatment, treated).await.unwrap();
    inspector.close().await;
    letters
}

/// The queue in the file at `path`, apart from others that lead to the same file.
pub(crate) fn file_config(path: &Path) -> Config {
    let (queue_name, queue_type) = ("unused".to_owned(), QueueType::Quorum);
    let queue = QueueConfig { queue_name, queue_type, amqp_ca: None };
    Config { amqp_uri: BrokerUrl::file(path.to_owned()), queue }
}

pub(crate) fn amqp_config(queue: &Queue, queue_type: QueueType) -> Config {
    let amqp_uri = testbed::amqp_uri().parse().unwrap();
    let queue = QueueConfig { queue_name: queue.name.clone(), queue_type, amqp_ca: None };
    Config { amqp_uri, queue }
}

pub(crate) async fn connected(config: &Config) -> Publisher {
    let publisher = Publisher::start(config, "test publisher").unwrap();
    let mut status = publisher.status();
    timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    publisher
}

pub(crate) fn consumer(publisher: &Publisher, prefetch: u16) -> Consumer {
    Consumer::new(publisher, "test consumer", prefetch)
}

pub(crate) async fn next(consumer: &mut Consumer) -> Delivery {
    timeout(PATIENCE, consumer.next()).await.expect("a delivery should come")
}

/// Takes and acks the next `count` messages, and gives their objects.
pub(crate) async fn drain(consumer: &mut Consumer, count: usize) -> Vec<i64> {
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

/// What `future` gives, if it gives it when it is polled up to `steps` times; else it is dropped.
pub(crate) async fn for_steps<T>(steps: u32, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    let mut left = steps;
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
