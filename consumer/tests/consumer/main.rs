//! Tests the consumer with a real broker, a real database and a simulated status API. All tests are
//! in one binary, because each binary takes seconds to link.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "test helpers may panic, too")]

mod answers;
mod breaker;
mod coalescing;
mod connections;
mod events;
mod failures;
mod lookups;
mod outages;
mod process;
mod settings;
mod shutdown;
mod writes;

use std::time::{Duration, Instant};

use messaging::queue::Publisher;
use runtime::Supervisor;
use testkit::{
    Answer, Database, InProcess, PATIENCE, Proxy, Queue, RETRY_LEVELS, StatusApi, install_tls,
    parse, wait_for, wait_until,
};
use tokio::time::timeout;

const SECOND: Duration = Duration::from_secs(1);
/// How long a test waits to see that something does not happen.
const SETTLE_TIME: Duration = Duration::from_millis(500);
/// The callback id of the messages that a test publishes.
const CALLBACK_ID: &str = "callback-1";

/// A consumer that runs in this process.
type RunningConsumer = InProcess<consumer::Config>;

/// The queue and the database of one test.
struct TestEnv {
    publisher: Publisher,
    queue: Queue,
    database: Database,
}

impl TestEnv {
    /// Declares the queues. The table does not exist yet.
    async fn new() -> Self {
        install_tls();
        let queue = Queue::new();
        let database = Database::new().await;
        let settings =
            [format!("--amqp-uri={}", testkit::amqp_uri()), format!("--queue-name={}", queue.name)];
        let config: consumer::Config = parse(&settings);
        let publisher =
            Publisher::start(config.broker.open(&Supervisor::default()).unwrap(), "test publisher");
        let mut status = publisher.status();
        timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
        Self { publisher, queue, database }
    }

    /// Like [`TestEnv::new`], with a status API that answers every lookup with `answer`.
    async fn with_answer(answer: Answer) -> (Self, StatusApi) {
        (Self::new().await, StatusApi::start(move |_, _| answer.clone()))
    }

    async fn with_all_online() -> (Self, StatusApi) {
        Self::with_answer(Answer::Online).await
    }

    /// Starts a consumer that uses `status_api`. The further settings, such as `--max-consumers=3`,
    /// override the others.
    fn start(&self, status_api: &str, further: &[&str]) -> RunningConsumer {
        let mut settings = vec![
            format!("--amqp-uri={}", testkit::amqp_uri()),
            format!("--queue-name={}", self.queue.name),
            format!("--database-url={}", self.database.url()),
            format!("--tester-endpoint={status_api}"),
        ];
        settings.extend(further.iter().map(|&setting| setting.to_owned()));
        InProcess::start(consumer::run, settings)
    }

    async fn publish(&self, ids: impl IntoIterator<Item = i64>) {
        let ids: Vec<i64> = ids.into_iter().collect();
        self.publisher.publish_ids(CALLBACK_ID, &ids, PATIENCE).await.unwrap();
    }

    /// The ids in the table, in ascending order; none before the table exists.
    async fn rows(&self) -> Vec<i64> {
        let query = sqlx::query_scalar("SELECT id FROM object ORDER BY id");
        query.fetch_all(self.database.pool()).await.unwrap_or_default()
    }

    /// Waits until exactly these ids, given in ascending order, are in the table.
    async fn wait_until_recorded(&self, ids: impl IntoIterator<Item = i64>) {
        let ids: Vec<i64> = ids.into_iter().collect();
        wait_until("exactly the expected ids are recorded", async || self.rows().await == ids)
            .await;
    }

    /// Waits until a consumer has created the table.
    async fn wait_until_migrated(&self) {
        wait_for("the table exists", async || {
            sqlx::query("SELECT FROM object").execute(self.database.pool()).await.ok()
        })
        .await;
    }

    /// The `last_seen` of an object, in seconds.
    async fn last_seen(&self, id: i64) -> f64 {
        let sql = "SELECT extract(epoch FROM last_seen)::float8 FROM object WHERE id = $1";
        sqlx::query_scalar(sql).bind(id).fetch_one(self.database.pool()).await.unwrap()
    }

    /// The database's clock, in seconds.
    async fn clock(&self) -> f64 {
        let sql = "SELECT extract(epoch FROM clock_timestamp())::float8";
        sqlx::query_scalar(sql).fetch_one(self.database.pool()).await.unwrap()
    }

    /// The number of messages that are ready in the queue, without the unacked ones.
    async fn ready(&self) -> u32 {
        self.queue.depth(&self.queue.name).await.expect("the queue should exist")
    }

    async fn dead_letters(&self) -> u32 {
        self.queue.depth(&self.queue.dead()).await.expect("the dead-letter queue should exist")
    }

    async fn in_delay_queues(&self) -> u32 {
        let mut all = 0;
        for level in RETRY_LEVELS {
            let name = format!("{}.retry.{level}", self.queue.name);
            all += self.queue.depth(&name).await.expect("the delay queues should exist");
        }
        all
    }

    /// Asserts that no message is left. Call it after the end of the consumers, because unacked
    /// messages are counted only when they are back in the queue.
    async fn assert_all_settled(&self) {
        let left = (self.ready().await, self.in_delay_queues().await, self.dead_letters().await);
        assert_eq!(
            left,
            (0, 0, 0),
            "messages left in the queue, the delay queues, the dead letters"
        );
    }

    /// Drains the consumer, and asserts that no message is left.
    async fn drain(&self, consumer: RunningConsumer) {
        consumer.stop().await;
        self.assert_all_settled().await;
    }

    /// A proxy to the database that can be cut, and the setting that makes a consumer use it.
    async fn database_proxy(&self) -> (Proxy, String) {
        let (proxy, url) = Proxy::before(self.database.url()).await;
        (proxy, format!("--database-url={url}"))
    }
}

/// The times of the lookups of `id`, in order.
fn lookup_times(api: &StatusApi, id: i64) -> Vec<Instant> {
    let lookups = api.lookups().into_iter();
    lookups.filter_map(|(looked_up, at)| (looked_up == id).then_some(at)).collect()
}

/// The ids of all lookups, in ascending order, with repetitions.
fn looked_up(apis: &[&StatusApi]) -> Vec<i64> {
    let mut ids: Vec<i64> = apis.iter().flat_map(|api| api.lookups()).map(|(id, _)| id).collect();
    ids.sort_unstable();
    ids
}
