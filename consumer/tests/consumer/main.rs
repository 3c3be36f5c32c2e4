//! The consumer against a real broker, a real database and a status API that behaves as told. One
//! binary, because each takes seconds to link.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "the helpers of tests are tests as well"
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
use service::{CancellationToken, Changer, Health, Live};
use testbed::{Database, Proxy, Queue, RETRY_LEVELS, StatusApi, eventually};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use url::Url;

const SECOND: Duration = Duration::from_secs(1);
/// Far more than anything here needs, because a machine that runs all tests at once is slow.
const PATIENCE: Duration = Duration::from_secs(40);
/// Long enough for what must not happen to have happened, if it could.
const A_WHILE: Duration = Duration::from_millis(500);
/// The callback that names the ids of a test.
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

/// What stands around the consumers of one test: a queue and a database that are nobody else's.
struct Surroundings {
    publisher: Publisher,
    queue: Queue,
    database: Database,
}

impl Surroundings {
    /// With the queues declared, and no table yet.
    async fn new() -> Self {
        // A second test in this process finds it installed.
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

    /// Starts a consumer that asks `status_api`, with further settings such as `--max-consumers=3`,
    /// which win over what it would be given.
    fn start(&self, status_api: &str, further: &[&str]) -> Running {
        let mut settings = vec![
            format!("--amqp-uri={}", testbed::amqp_uri()),
            format!("--queue-name={}", self.queue.name),
            format!("--database-url={}", self.database.url()),
            format!("--tester-endpoint={status_api}"),
        ];
        settings.extend(further.iter().map(|&setting| setting.to_owned()));
        let (health, shutdown) = (Health::default(), CancellationToken::new());
        let (changer, config) = Live::changeable(config(&settings));
        let run = consumer::run(config, health.clone(), shutdown.clone());
        Running { health, shutdown, changer, settings, run: tokio::spawn(run) }
    }

    async fn publish(&self, ids: impl IntoIterator<Item = i64>) {
        let ids: Vec<i64> = ids.into_iter().collect();
        self.publisher.publish_ids(CALLBACK_ID, &ids, PATIENCE).await.unwrap();
    }

    /// The ids in the table, in ascending order; none while there is no table.
    async fn rows(&self) -> Vec<i64> {
        let query = sqlx::query_scalar("SELECT id FROM object ORDER BY id");
        query.fetch_all(self.database.pool()).await.unwrap_or_default()
    }

    /// Waits until exactly these ids, given in ascending order, are in the table.
    async fn recorded(&self, ids: impl IntoIterator<Item = i64>) {
        let ids: Vec<i64> = ids.into_iter().collect();
        eventually("exactly the expected ids are recorded", PATIENCE, async || {
            (self.rows().await == ids).then_some(())
        })
        .await;
    }

    /// Waits until a consumer has brought the table into being.
    async fn migrated(&self) {
        eventually("the table is there", PATIENCE, async || {
            sqlx::query("SELECT FROM object").execute(self.database.pool()).await.ok()
        })
        .await;
    }

    /// When an object was last seen, in seconds.
    async fn last_seen(&self, id: i64) -> f64 {
        let sql = "SELECT extract(epoch FROM last_seen)::float8 FROM object WHERE id = $1";
        sqlx::query_scalar(sql).bind(id).fetch_one(self.database.pool()).await.unwrap()
    }

    /// The database's clock, in seconds.
    async fn clock(&self) -> f64 {
        let sql = "SELECT extract(epoch FROM clock_timestamp())::float8";
        sqlx::query_scalar(sql).fetch_one(self.database.pool()).await.unwrap()
    }

    /// How many messages wait in the queue itself, neither taken nor unacked.
    async fn waiting(&self) -> u32 {
        self.queue.depth(&self.queue.name).await.expect("the queue should be there")
    }

    async fn dead(&self) -> u32 {
        self.queue.depth(&self.queue.dead()).await.expect("the dead letters should be there")
    }

    async fn in_retry_queues(&self) -> u32 {
        let mut all = 0;
        for level in RETRY_LEVELS {
            let name = format!("{}.retry.{level}", self.queue.name);
            all += self.queue.depth(&name).await.expect("the delay queues should be there");
        }
        all
    }

    /// Fails unless nothing is left of what was published. What an ended consumer has not acked is
    /// back in the queue, so this is for after its end.
    async fn assert_all_settled(&self) {
        let left = (self.waiting().await, self.in_retry_queues().await, self.dead().await);
        assert_eq!(left, (0, 0, 0), "messages left: in the queue, to be tried again, dead");
    }

    /// A way to the database that can be cut, and the setting that makes a consumer take it.
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
struct Running {
    health: Health,
    shutdown: CancellationToken,
    changer: Changer<consumer::Config>,
    settings: Vec<String>,
    run: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    /// Changes its settings by flags such as `--max-consumers=3`.
    fn change(&self, further: &[&str]) {
        let further = further.iter().map(|&setting| setting.to_owned());
        let settings: Vec<_> = self.settings.iter().cloned().chain(further).collect();
        self.changer.set(config(&settings));
    }

    /// Lets it drain; it has to end well.
    async fn stop(self) {
        self.shutdown.cancel();
        let ended = timeout(PATIENCE, self.run).await.expect("the consumer should drain");
        ended.expect("the consumer should not panic").expect("the consumer should end well");
    }

    /// The peers that it misses now.
    fn missing(&self) -> Vec<&'static str> {
        self.health.missing().into_iter().map(|(peer, _)| peer).collect()
    }

    /// Waits until it misses exactly these peers.
    async fn misses(&self, peers: &[&str]) {
        eventually(&format!("the consumer misses {peers:?}"), PATIENCE, async || {
            (self.missing() == peers).then_some(())
        })
        .await;
    }
}

/// When `id` was looked up, the first time first.
fn times_of(api: &StatusApi, id: i64) -> Vec<Instant> {
    let lookups = api.lookups().into_iter();
    lookups.filter_map(|(looked_up, at)| (looked_up == id).then_some(at)).collect()
}

/// Which ids were looked up, each as often as it was, in ascending order.
fn looked_up(apis: &[&StatusApi]) -> Vec<i64> {
    let mut ids: Vec<i64> = apis.iter().flat_map(|api| api.lookups()).map(|(id, _)| id).collect();
    ids.sort_unstable();
    ids
}
