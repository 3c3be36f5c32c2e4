//! The servers of a measurement.

use std::time::Duration;

use pipeline::System;
use testbed::{Database, PostgresCluster, Process, Queue, RabbitNode, eventually};

/// Names a broker to measure with, instead of a node of our own.
const AMQP_URI: &str = "BENCH_AMQP_URI";
/// Names a Postgres to measure with, instead of a cluster of our own.
const DATABASE_URL: &str = "BENCH_DATABASE_URL";

/// How long something may take that is not measured.
const PATIENCE: Duration = Duration::from_mins(1);

/// A broker and a database server. Each measurement has a queue and a database of its own on them.
pub(crate) struct World {
    amqp_uri: String,
    database_url: String,
    _broker: Option<RabbitNode>,
    _database: Option<PostgresCluster>,
}

/// One queue and one database, gone when it is dropped.
pub(crate) struct Place {
    pub(crate) queue: Queue,
    pub(crate) database: Database,
    pub(crate) system: System,
}

impl World {
    /// Starts what the environment does not name.
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

    /// A place in which the status API is at `status_api`. Its queue is not declared yet.
    pub(crate) async fn place(&self, status_api: String) -> Place {
        let queue = Queue::on(&self.amqp_uri);
        let database = Database::on(&self.database_url).await;
        let system = System {
            amqp_uri: self.amqp_uri.clone(),
            queue: queue.name.clone(),
            database: database.environment(),
            status_api,
        };
        Place { queue, database, system }
    }
}

impl Place {
    /// Has the queue declared, as ours is, and the table made.
    pub(crate) async fn prepare(&self) {
        let producer = self.system.spawn("producer", &[]);
        // A producer is ready without its broker, too.
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

/// What happens in a second, if `count` things take so long.
#[expect(clippy::cast_precision_loss, reason = "nothing here is counted beyond 2^53")]
pub(crate) fn per_second(count: u64, took: Duration) -> f64 {
    count as f64 / took.as_secs_f64()
}
