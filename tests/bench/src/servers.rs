//! The servers of a measurement.

use std::time::Duration;

use testkit::{Database, PostgresCluster, Queue, RabbitNode, System, wait_for};

/// The variable that names a broker to measure with, instead of a private node.
const AMQP_URI: &str = "BENCH_AMQP_URI";
/// The variable that names a Postgres to measure with, instead of a private cluster.
const DATABASE_URL: &str = "BENCH_DATABASE_URL";

/// A broker and a database server. Each measurement has its own queue and database on them.
pub(crate) struct Servers {
    pub(crate) amqp_uri: String,
    database_url: String,
    _broker: Option<RabbitNode>,
    _database: Option<PostgresCluster>,
}

/// One queue and one database for the services of one measurement, which are removed on drop.
pub(crate) struct Deployment {
    pub(crate) queue: Queue,
    pub(crate) database: Database,
    pub(crate) system: System,
}

impl Servers {
    /// Starts the servers that the environment does not name.
    pub(crate) async fn start() -> Self {
        let (mut broker, mut database) = (None, None);
        let amqp_uri = if let Ok(uri) = std::env::var(AMQP_URI) {
            uri
        } else {
            broker.insert(RabbitNode::start().await).amqp_uri()
        };
        let database_url = if let Ok(url) = std::env::var(DATABASE_URL) {
            url
        } else {
            database.insert(PostgresCluster::start().await).url().to_owned()
        };
        Self { amqp_uri, database_url, _broker: broker, _database: database }
    }

    /// The same database server with another broker.
    pub(crate) fn with_broker(&self, amqp_uri: String) -> Self {
        let database_url = self.database_url.clone();
        Self { amqp_uri, database_url, _broker: None, _database: None }
    }

    /// A deployment whose queue is declared and whose table exists, because a producer and a
    /// routine have run.
    pub(crate) async fn prepared(&self, status_api: String) -> Deployment {
        let deployment = self.deployment(status_api).await;
        let Deployment { queue, system, .. } = &deployment;
        let producer = system.spawn("producer", &[]);
        // Wait for the queue, because a producer is also ready without its broker.
        wait_for("the queue is declared", async || queue.depth(&queue.name).await).await;
        let routine = system.start("routine", &[]).await;
        for process in [producer, routine] {
            process.stop().await;
        }
        deployment
    }

    /// A deployment whose status API is at `status_api`. Its queue is not declared yet.
    pub(crate) async fn deployment(&self, status_api: String) -> Deployment {
        let queue = Queue::on(&self.amqp_uri);
        let database = Database::on(&self.database_url).await;
        let system = System::new(&queue, &database, &status_api);
        Deployment { queue, database, system }
    }
}

/// The rate of `count` events in the time `took`.
#[expect(clippy::cast_precision_loss, reason = "nothing here is counted beyond 2^53")]
pub(crate) fn per_second(count: u64, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}
