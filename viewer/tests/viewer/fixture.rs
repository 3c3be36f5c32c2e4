//! What stands around a viewer: a table, and somebody who writes to it and tells what was written.

use std::time::Duration;

use amqp::Access;
use clap::Parser as _;
use events::{Emitter, Exchange, Kind, Object};
use reqwest::Client;
use service::{CancellationToken, Health};
use store::{Config, Row, Sighting, Store};
use testbed::{Database, Queue, eventually};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use viewer::Viewer;

use crate::subscriber::Subscriber;
use crate::{HOUR, PATIENCE};

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    config: viewer::Config,
}

pub(crate) struct Around {
    /// Gone with its exchange when this is dropped.
    _queue: Queue,
    pub(crate) database: Database,
    pub(crate) exchange: Exchange,
    store: Store,
    emitter: Emitter,
}

fn object(row: &Row) -> Object {
    Object { id: row.id, last_seen: row.last_seen.time() }
}

impl Around {
    pub(crate) async fn new() -> Self {
        Self::at(&testbed::amqp_uri(), Queue::new()).await
    }

    /// With the queue on another broker than the shared one.
    pub(crate) async fn at(amqp_uri: &str, queue: Queue) -> Self {
        let database = Database::new().await;
        let access = Access { uri: amqp_uri.parse().unwrap(), authorities: None };
        let exchange = Exchange::on_rabbitmq(access, &queue.name);
        let store = Store::start(&Config::at(database.url().parse().unwrap()), "test", 2).unwrap();
        let emitter = Emitter::start(&exchange, "test");
        let around = Self { _queue: queue, database, exchange, store, emitter };
        let mut status = around.store.status();
        timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
        around.can_tell().await;
        around
    }

    pub(crate) async fn can_tell(&self) {
        let mut status = self.emitter.status().unwrap();
        timeout(PATIENCE, status.wait_for(Result::is_ok)).await.unwrap().unwrap();
    }

    /// Writes that they were seen now, and tells it.
    pub(crate) async fn see(&self, ids: impl IntoIterator<Item = i64>) {
        self.see_ago(ids, Duration::ZERO).await;
    }

    pub(crate) async fn see_ago(&self, ids: impl IntoIterator<Item = i64>, age: Duration) {
        let sightings: Vec<Sighting> = ids.into_iter().map(|id| Sighting { id, age }).collect();
        let recorded = self.store.record_seen(&sightings).await.unwrap();
        self.emitter.publish(Kind::Online, recorded.inserted.iter().map(object));
        self.emitter.publish(Kind::Seen, recorded.updated.iter().map(object));
    }

    /// Deletes whoever was seen more than an hour ago, and tells it.
    pub(crate) async fn clean_up(&self) {
        let now = self.store.now().await.unwrap();
        let gone = self.store.delete_stale(now.before(HOUR), 10_000).await.unwrap();
        self.emitter.publish(Kind::Gone, gone.iter().map(object));
    }

    /// Does so, and nobody hears of it.
    pub(crate) async fn silently(&self, sql: &'static str) {
        sqlx::query(sql).execute(self.database.pool()).await.unwrap();
    }

    /// Starts a viewer in this process, and waits until it shows something.
    pub(crate) async fn view(&self) -> Running {
        self.view_with(self.exchange.clone()).await
    }

    pub(crate) async fn view_with(&self, exchange: Exchange) -> Running {
        let running = self.view_unready(exchange);
        eventually("the viewer is ready", PATIENCE, async || {
            running.health.missing().is_empty().then_some(())
        })
        .await;
        running
    }

    pub(crate) fn view_unready(&self, exchange: Exchange) -> Running {
        // A second test in this process finds it installed.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = format!("--database-url={}", self.database.url());
        let settings = ["viewer", &url, "--viewer-addr=127.0.0.1:0"];
        let mut config = Cli::parse_from(settings).config;
        config.events = events::Config::with_exchange(exchange);
        let (health, shutdown) = (Health::default(), CancellationToken::new());
        let viewer = Viewer::open(config, &health).unwrap();
        let url = format!("http://{}", viewer.address().unwrap());
        let ended = tokio::spawn(viewer.serve(shutdown.clone()));
        Running { health, url, shutdown, ended }
    }
}

/// A viewer in this process.
pub(crate) struct Running {
    pub(crate) health: Health,
    pub(crate) url: String,
    shutdown: CancellationToken,
    ended: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    pub(crate) async fn subscribe(&self, query: &str, after: Option<&str>) -> Subscriber {
        Subscriber::connect(&self.url, query, after).await
    }

    pub(crate) async fn get(&self, path: &str) -> (u16, serde_json::Value) {
        get(&self.url, path).await
    }

    /// The ids that it lists.
    pub(crate) async fn ids(&self) -> Vec<i64> {
        let (_, page) = self.get("/objects?limit=1000").await;
        let objects = page["objects"].as_array().cloned().unwrap_or_default();
        objects.iter().map(|object| object["id"].as_str().unwrap().parse().unwrap()).collect()
    }

    pub(crate) async fn shows(&self, ids: impl IntoIterator<Item = i64>) {
        let ids: Vec<i64> = ids.into_iter().collect();
        eventually("exactly these are shown", PATIENCE, async || {
            (self.ids().await == ids).then_some(())
        })
        .await;
    }

    pub(crate) async fn stop(self) {
        self.shutdown.cancel();
        timeout(PATIENCE, self.ended).await.unwrap().unwrap().unwrap();
    }
}

pub(crate) fn client() -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().no_proxy().build().unwrap()
}

/// The status, and the body as JSON.
pub(crate) async fn get(url: &str, path: &str) -> (u16, serde_json::Value) {
    let answer = client().get(format!("{url}{path}")).send().await.unwrap();
    let (status, text) = (answer.status().as_u16(), answer.text().await.unwrap());
    (status, serde_json::from_str(&text).unwrap_or_default())
}
