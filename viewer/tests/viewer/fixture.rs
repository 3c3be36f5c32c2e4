//! The environment of a viewer: a database, and a writer that publishes its changes as events.

use std::time::{Duration, SystemTime};

use messaging::amqp::Access;
use messaging::events::{Emitter, Exchange, GivenUp, Kind, Object};
use reqwest::Client;
use runtime::{CancellationToken, Context, Health, Reloadable, Supervisor};
use store::{Config, Row, Sighting, Store};
use testkit::{Database, PostgresCluster, Queue, http_client, install_tls, parse, wait_until};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use viewer::{Resources, Viewer};

use crate::subscriber::Subscriber;
use crate::{HOUR, PATIENCE};

pub(crate) struct Fixture {
    /// Deletes its exchange when dropped.
    pub(crate) queue: Queue,
    pub(crate) database: Database,
    pub(crate) exchange: Exchange,
    store: Store,
    emitter: Emitter,
}

fn object(row: &Row) -> Object {
    Object { id: row.id, last_seen: row.last_seen.time() }
}

impl Fixture {
    pub(crate) async fn new() -> Self {
        Self::on_broker(&testkit::amqp_uri(), Queue::new()).await
    }

    /// A fixture whose database is in a cluster of its own, where no transaction of another test
    /// delays the history.
    pub(crate) async fn alone() -> (PostgresCluster, Self) {
        let cluster = PostgresCluster::start().await;
        let database = Database::on(cluster.url()).await;
        (cluster, Self::with(&testkit::amqp_uri(), Queue::new(), database).await)
    }

    /// A fixture whose queue is on another broker than the shared one.
    pub(crate) async fn on_broker(amqp_uri: &str, queue: Queue) -> Self {
        Self::with(amqp_uri, queue, Database::new().await).await
    }

    async fn with(amqp_uri: &str, queue: Queue, database: Database) -> Self {
        let access = Access { uri: amqp_uri.parse().unwrap(), authorities: None };
        let exchange = Exchange::on_rabbitmq(access, &queue.name);
        let store = Store::start(
            Config::at(database.url().parse().unwrap()).open(&Supervisor::default()).unwrap(),
            "test",
            2,
        );
        let emitter = Emitter::start(&exchange, "test", &Supervisor::default());
        let fixture = Self { queue, database, exchange, store, emitter };
        let mut status = fixture.store.status();
        timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
        fixture.wait_for_emitter().await;
        fixture
    }

    /// A fixture with these objects, and a viewer that lists them.
    pub(crate) async fn showing<const N: usize>(ids: [i64; N]) -> (Self, RunningViewer) {
        let fixture = Self::new().await;
        fixture.record(ids).await;
        let viewer = fixture.start_viewer().await;
        viewer.expect_objects(ids).await;
        // A viewer is also ready without events. It would then find the first changes only by its
        // next reading of the table, after those that it receives as events.
        let receives_events = async || viewer.health.missing_optional().is_empty();
        wait_until("the viewer receives events", receives_events).await;
        (fixture, viewer)
    }

    /// Waits until events can be published.
    pub(crate) async fn wait_for_emitter(&self) {
        let mut status = self.emitter.status().unwrap();
        timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    }

    /// Records sightings of objects now, and publishes the changes.
    pub(crate) async fn record(&self, ids: impl IntoIterator<Item = i64>) {
        self.record_aged(ids, Duration::ZERO).await;
    }

    pub(crate) async fn record_aged(&self, ids: impl IntoIterator<Item = i64>, age: Duration) {
        let sightings: Vec<Sighting> = ids.into_iter().map(|id| Sighting { id, age }).collect();
        let recorded = self.store.record_seen(&sightings).await.unwrap();
        self.emitter.publish(Kind::Online, recorded.inserted.iter().map(object));
        self.emitter.publish(Kind::Seen, recorded.updated.iter().map(object));
    }

    /// Deletes objects that were seen more than an hour ago, and publishes the changes.
    pub(crate) async fn clean_up(&self) {
        let now = self.store.now().await.unwrap();
        let gone = self.store.delete_stale(now.before(HOUR), 10_000).await.unwrap();
        self.emitter.publish(Kind::Gone, gone.iter().map(object));
    }

    /// Announces that a consumer has given up the object.
    pub(crate) fn give_up(&self, id: i64) {
        self.emitter.publish_given_up(GivenUp { id, at: SystemTime::now() });
    }

    /// Changes the table without an event.
    pub(crate) async fn execute_without_event(&self, sql: &'static str) {
        sqlx::query(sql).execute(self.database.pool()).await.unwrap();
    }

    /// Starts a viewer in this process, and waits until it is ready.
    pub(crate) async fn start_viewer(&self) -> RunningViewer {
        self.start_viewer_with(self.exchange.clone()).await
    }

    pub(crate) async fn start_viewer_with(&self, exchange: Exchange) -> RunningViewer {
        let running = self.start_unready_viewer(exchange).await;
        wait_until("the viewer is ready", async || running.health.missing().is_empty()).await;
        running
    }

    /// Starts a viewer that reads no history.
    pub(crate) async fn start_viewer_without_history(&self) -> RunningViewer {
        let running = self
            .start_viewer_with_settings(self.exchange.clone(), &["--history-retention=0"])
            .await;
        wait_until("the viewer is ready", async || running.health.missing().is_empty()).await;
        running
    }

    pub(crate) async fn start_unready_viewer(&self, exchange: Exchange) -> RunningViewer {
        self.start_viewer_with_settings(exchange, &[]).await
    }

    /// Starts a viewer with additional settings. Does not wait until it is ready.
    pub(crate) async fn start_viewer_with_settings(
        &self,
        exchange: Exchange,
        settings: &[&str],
    ) -> RunningViewer {
        install_tls();
        let url = format!("--database-url={}", self.database.url());
        let own = [url.as_str(), "--viewer-addr=127.0.0.1:0"];
        let config: viewer::Config = parse([&own[..], settings].concat());
        let groups = config.groups.load(Reloadable::fixed(config.object_ttl)).await.unwrap();
        let resources = Resources { store: config.store, exchange, groups, is_pipeline: false };
        let context = Context::default();
        let viewer = Viewer::open(&config.view, resources, context.clone()).unwrap();
        let url = format!("http://{}", viewer.address().unwrap());
        let ended = tokio::spawn(viewer.serve());
        let Context { health, shutdown, supervisor } = context;
        RunningViewer { health, url, supervisor, shutdown, ended }
    }
}

pub(crate) struct RunningViewer {
    pub(crate) health: Health,
    pub(crate) url: String,
    pub(crate) supervisor: Supervisor,
    shutdown: CancellationToken,
    ended: JoinHandle<anyhow::Result<()>>,
}

impl RunningViewer {
    pub(crate) async fn subscribe(&self, query: &str, after: Option<&str>) -> Subscriber {
        Subscriber::connect(&self.url, query, after).await
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, serde_json::Value) {
        get(&self.url, path).await
    }

    /// The ids of all objects that the viewer lists.
    pub(crate) async fn ids(&self) -> Vec<i64> {
        ids(&self.get("/objects?limit=1000").await.1)
    }

    /// Waits until the viewer lists exactly these objects.
    pub(crate) async fn expect_objects(&self, ids: impl IntoIterator<Item = i64>) {
        let ids: Vec<i64> = ids.into_iter().collect();
        wait_until("exactly these objects are listed", async || self.ids().await == ids).await;
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        timeout(PATIENCE, self.ended).await.unwrap().unwrap().unwrap();
    }
}

/// The ids of the objects in a response.
pub(crate) fn ids(page: &serde_json::Value) -> Vec<i64> {
    let objects = page["objects"].as_array().unwrap().iter();
    objects.map(|object| object["id"].as_str().unwrap().parse().unwrap()).collect()
}

pub(crate) fn client() -> Client {
    http_client(HOUR)
}

/// Returns the status, and the body as JSON.
pub(crate) async fn get(url: &str, path: &str) -> (u16, serde_json::Value) {
    let answer = client().get(format!("{url}{path}")).send().await.unwrap();
    let (status, text) = (answer.status().as_u16(), answer.text().await.unwrap());
    (status, serde_json::from_str(&text).unwrap_or_default())
}
