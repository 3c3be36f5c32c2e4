//! The servers of a measurement.

use std::time::Duration;

use pipeline::System;
use testbed::{Database, PostgresCluster, Process, Queue, RabbitNode, eventually};

/// Names a broker to measure with, instead of a node of our own.
const AMQP_URI: &str = "BENCH_AMQP_URI";
/// Names a Postgres to measure with, instead of a cluster of our own.
const DATABASE_URL: &str = "BENCH_DATABASE_URL";

/// Time limit of steps that are not measured.
const PATIENCE: Duration = Duration::from_mins(1);

/// A broker and a database server. Each measurement has its own queue and database on them.
pub(crate) struct Servers {
    amqp_uri: String,
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

    pub(crate) fn amqp_uri(&self) -> &str {
        &self.amqp_uri
    }

    /// A deployment whose status API is at `status_api`. Its queue is not declared yet.
    pub(crate) async fn deployment(&self, status_api: String) -> Deployment {
        let queue = Queue::on(&self.amqp_uri);
        let database = Database::on(&self.database_url).await;
        let system = System {
            amqp_uri: self.amqp_uri.clone(),
            queue: queue.name.clone(),
            database: database.environment(),
            status_api,
        };
        Deployment { queue, database, system }
    }
}

impl Deployment {
    /// Declares the queue and creates the table, by starting a producer and a routine.
    pub(crate) async fn prepare(&self) {
        let producer = self.system.spawn("producer", &[]);
        // Wait for the queue, because a producer is also ready without its broker.
        eventually("the queue is declared", PATIENCE, async || {
            self.queue.depth(&self.queue.name).await
        })
        .await;
        let routine = self.spawn("routine", &[]).await;
        for process in [producer, routine] {
            process.terminate();
            process.wait().await;
        }
    }

    /// Starts a service and waits until it is ready.
    pub(crate) async fn spawn(&self, service: &str, variables: &[(&'static str, &str)]) -> Process {
        let process = self.system.spawn(service, variables);
        process.ready().await;
        process
    }
}

/// The rate of `count` events in the time `took`.
#[expect(clippy::cast_precision_loss, reason = "nothing here is counted beyond 2^53")]
pub(crate) fn per_second(count: u64, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}
