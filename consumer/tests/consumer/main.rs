//! Tests the consumer with a real broker, a real database and a simulated status API. All tests are
//! in one binary, because each binary takes seconds to link.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a helper of a test may panic as a test may"
)]

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

use broker::Publisher;
use clap::Parser as _;
use service::{CancellationToken, Health, ReloadHandle, Reloadable};
use testbed::{Database, Proxy, Queue, RETRY_LEVELS, StatusApi, eventually};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use url::Url;

const SECOND: Duration = Duration::from_secs(1);
/// Far longer than any step needs, because the machine is slow while all tests run.
const PATIENCE: Duration = Duration::from_secs(40);
/// How long a test waits to see that something does not happen.
const SETTLE_TIME: Duration = Duration::from_millis(500);
/// The callback id of the messages that a test publishes.
const CALLBACK_ID: &str = "callback-1";

#[derive(clap::Parser)]
#[command(args_override_self = true)]
struct Cli {
    #[command(flatten)]
    config: consumer::Config,
}

fn config(settings: &[String]) -> consumer::Config {
    let program = std::iter::once("consumer");
    Cli::parse_from(program.chain(settings.iter().map(String::as_str))).config
}

/// The queue and the database of one test.
struct TestEnv {
    publisher: Publisher,
    queue: Queue,
    database: Database,
}

impl TestEnv {
    /// Declares the queues. The table does not exist yet.
    async fn new() -> Self {
        // Fails in the second test of this process, because it is already installed.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let queue = Queue::new();
        let database = Database::new().await;
        let settings =
            [format!("--amqp-uri={}", testbed::amqp_uri()), format!("--queue-name={}", queue.name)];
        let publisher = Publisher::start(&config(&settings).broker, "test publisher").unwrap();
        let mut status = publisher.status();
        timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
        Self { publisher, queue, database }
    }

    /// Starts a consumer that uses `status_api`. The further settings, such as `--max-consumers=3`,
    /// override the others.
    fn start(&self, status_api: &str, further: &[&str]) -> RunningConsumer {
        let mut settings = vec![
            format!("--amqp-uri={}", testbed::amqp_uri()),
            format!("--queue-name={}", self.queue.name),
            format!("--database-url={}", self.database.url()),
            format!("--tester-endpoint={status_api}"),
        ];
        settings.extend(further.iter().map(|&setting| setting.to_owned()));
        let (health, shutdown) = (Health::default(), CancellationToken::new());
        let (changer, config) = Reloadable::with_handle(config(&settings));
        let run = consumer::run(config, health.clone(), shutdown.clone());
        RunningConsumer { health, shutdown, changer, settings, run: tokio::spawn(run) }
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
        eventually("exactly the expected ids are recorded", PATIENCE, async || {
            (self.rows().await == ids).then_some(())
        })
        .await;
    }

    /// Waits until a consumer has created the table.
    async fn wait_until_migrated(&self) {
        eventually("the table exists", PATIENCE, async || {
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

    /// A proxy to the database that can be cut, and the setting that makes a consumer use it.
    async fn database_proxy(&self) -> (Proxy, String) {
        let (proxy, url) = proxied(self.database.url(), 5432).await;
        (proxy, format!("--database-url={url}"))
    }
}

/// A proxy in front of the server that `url` names, and `url` with the proxy's address.
async fn proxied(url: &str, default_port: u16) -> (Proxy, Url) {
    let mut url = Url::parse(url).unwrap();
    let port = url.port().unwrap_or(default_port);
    let proxy = Proxy::start(format!("{}:{port}", url.host_str().unwrap())).await;
    url.set_host(Some(&proxy.addr().ip().to_string())).unwrap();
    url.set_port(Some(proxy.addr().port())).unwrap();
    (proxy, url)
}

/// A consumer that runs in this process.
struct RunningConsumer {
    health: Health,
    shutdown: CancellationToken,
    changer: ReloadHandle<consumer::Config>,
    settings: Vec<String>,
    run: JoinHandle<anyhow::Result<()>>,
}

impl RunningConsumer {
    /// Changes settings, given as flags such as `--max-consumers=3`.
    fn change(&self, further: &[&str]) {
        let further = further.iter().map(|&setting| setting.to_owned());
        let settings: Vec<_> = self.settings.iter().cloned().chain(further).collect();
        self.changer.set(config(&settings));
    }

    /// Drains the consumer, and asserts that it ends without an error.
    async fn stop(self) {
        self.shutdown.cancel();
        let ended = timeout(PATIENCE, self.run).await.expect("the consumer should drain");
        ended
            .expect("the consumer should not panic")
            .expect("the consumer should end without an error");
    }

    /// The dependencies that are away according to the consumer.
    fn missing(&self) -> Vec<&'static str> {
        self.health.missing().into_iter().map(|(dependency, _)| dependency).collect()
    }

    /// Waits until exactly these dependencies are away according to the consumer.
    async fn wait_until_missing(&self, dependencies: &[&str]) {
        eventually(&format!("the consumer misses {dependencies:?}"), PATIENCE, async || {
            (self.missing() == dependencies).then_some(())
        })
        .await;
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
