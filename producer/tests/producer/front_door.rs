//! A producer in this process, and what lies in its queue.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Parser as _;
use lapin::message::BasicGetMessage;
use lapin::options::{BasicGetOptions, QueueDeleteOptions};
use lapin::{Channel, Connection, ConnectionProperties};
use producer::FrontDoor;
use reqwest::header::HeaderMap;
use serde_json::Value;
use service::{CancellationToken, Health, settings};
use testbed::{Queue, Scratch, amqp_uri, eventually};
use tokio::task::JoinHandle;

/// Far more than anything here needs, because a machine that runs all tests at once is slow.
pub(crate) use crate::wire::DEADLINE;
/// How long the client of a callback waits for its answer.
pub(crate) const CLIENT_PATIENCE: Duration = Duration::from_secs(1);

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    config: producer::Config,
}

/// The settings that `arguments` make of the defaults. A test may give the broker of a busy machine more time than
/// an operator may.
pub(crate) fn config(arguments: &[String]) -> producer::Config {
    let timeout =
        |argument: &String| argument.strip_prefix("--publish-timeout=").map(str::to_owned);
    let others = arguments.iter().filter(|argument| timeout(argument).is_none()).cloned();
    let program = std::iter::once("producer".to_owned());
    let mut config = Cli::parse_from(program.chain(others)).config;
    if let Some(timeout) = arguments.iter().filter_map(timeout).next_back() {
        let parse = settings::duration(Duration::ZERO..=Duration::MAX);
        config.callbacks.publish_timeout = parse(&timeout).unwrap();
    }
    config
}

/// A producer on any free port, with a queue of its own.
pub(crate) struct Producer {
    pub(crate) address: SocketAddr,
    pub(crate) health: Health,
    pub(crate) shutdown: Shutdown,
    pub(crate) served: JoinHandle<anyhow::Result<()>>,
    pub(crate) queue: Queue,
    scratch: Scratch,
    client: reqwest::Client,
}

/// Stops the producer, at the latest on drop.
pub(crate) struct Shutdown(CancellationToken);

impl Shutdown {
    pub(crate) fn cancel(&self) {
        self.0.cancel();
    }
}

impl Drop for Shutdown {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// The answer to a callback.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
    pub(crate) took: Duration,
}

impl Producer {
    /// One that is connected to the shared broker, and gives it time, also on a busy machine.
    pub(crate) async fn start(arguments: &[&str]) -> Self {
        let mut all = vec!["--publish-timeout=10s"];
        if arguments.iter().any(|argument| argument.starts_with("--publish-timeout")) {
            all.clear();
        }
        all.extend(arguments);
        let producer = Self::start_at(&amqp_uri(), &all).await;
        producer.ready().await;
        eventually("the broker is there", DEADLINE, async || {
            producer.health.done_without().is_empty().then_some(())
        })
        .await;
        producer
    }

    /// One that looks for its broker at `amqp_uri`.
    pub(crate) async fn start_at(amqp_uri: &str, arguments: &[&str]) -> Self {
        Self::start_with(Queue::new(), Scratch::new("spool"), amqp_uri, arguments).await
    }

    async fn start_with(
        queue: Queue,
        scratch: Scratch,
        amqp_uri: &str,
        arguments: &[&str],
    ) -> Self {
        let mut all = vec![
            "--producer-addr=127.0.0.1:0".to_owned(),
            format!("--amqp-uri={amqp_uri}"),
            format!("--queue-name={}", queue.name),
        ];
        if !arguments.iter().any(|argument| argument.starts_with("--spool-dir")) {
            all.push(format!("--spool-dir={}", scratch.path().join("spool").display()));
        }
        all.extend(arguments.iter().map(|&argument| argument.to_owned()));
        let health = Health::default();
        let front_door = FrontDoor::open(&config(&all), &health).await.unwrap();
        let address = front_door.address().unwrap();
        let shutdown = Shutdown(CancellationToken::new());
        let served = tokio::spawn(front_door.serve(shutdown.0.clone()));
        Self { address, health, shutdown, served, queue, scratch, client: client() }
    }

    /// Stops it, and starts another on the same queue and spool.
    pub(crate) async fn start_again(self, amqp_uri: &str, arguments: &[&str]) -> Self {
        let Self { shutdown, served, queue, scratch, .. } = self;
        shutdown.cancel();
        served.await.unwrap().unwrap();
        Self::start_with(queue, scratch, amqp_uri, arguments).await
    }

    /// Its `SPOOL_DIR`, and the directory above.
    pub(crate) fn directory(&self) -> &Path {
        self.scratch.path()
    }

    pub(crate) async fn ready(&self) {
        eventually("the producer is ready", DEADLINE, async || {
            self.health.missing().is_empty().then_some(())
        })
        .await;
    }

    /// Waits until it is connected to the broker, which to be ready it need not be.
    pub(crate) async fn connected(&self) {
        eventually("the producer has its broker", DEADLINE, async || {
            self.health.done_without().iter().all(|(name, _)| *name != "broker").then_some(())
        })
        .await;
    }

    pub(crate) async fn post(&self, body: impl Into<reqwest::Body>) -> Answer {
        self.send(self.request("POST", "/callback").body(body)).await
    }

    pub(crate) async fn post_ids(&self, ids: &[i64]) -> Answer {
        self.post(format!(r#"{{"object_ids":{ids:?}}}"#)).await
    }

    pub(crate) fn request(&self, method: &str, path: &str) -> reqwest::RequestBuilder {
        let url = format!("http://{}{path}", self.address);
        self.client.request(method.parse().unwrap(), url)
    }

    pub(crate) async fn send(&self, request: reqwest::RequestBuilder) -> Answer {
        let started = Instant::now();
        let response = request.send().await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let body = response.text().await.unwrap();
        let took = started.elapsed();
        let body = serde_json::from_str(&body).unwrap_or(Value::String(body));
        Answer { status, headers, body, took }
    }

    /// Takes all messages out of the queue.
    pub(crate) async fn messages(&self) -> Vec<BasicGetMessage> {
        let mut messages = Vec::new();
        if self.queue.depth(&self.queue.name).await.is_none() {
            return messages;
        }
        let broker = Broker::connect().await;
        let take = BasicGetOptions { no_ack: true };
        while let Some(message) =
            broker.channel.basic_get(self.queue.name.as_str().into(), take).await.unwrap()
        {
            messages.push(message);
        }
        messages
    }

    /// Takes all messages out of the queue and gives their ids in ascending order.
    pub(crate) async fn ids(&self) -> Vec<i64> {
        let messages = self.messages().await;
        let mut ids: Vec<i64> = messages.iter().map(|m| id_in(&m.delivery.data)).collect();
        ids.sort_unstable();
        ids
    }

    /// Takes messages out of the queue until each of `wanted` has come, and tells how often each did.
    pub(crate) async fn all_arrive(&self, wanted: &BTreeSet<i64>) -> BTreeMap<i64, usize> {
        let mut arrived = BTreeMap::new();
        eventually("all that was accepted is in the queue", DEADLINE, async || {
            for id in self.ids().await {
                *arrived.entry(id).or_default() += 1;
            }
            wanted.iter().all(|id| arrived.contains_key(id)).then_some(())
        })
        .await;
        arrived
    }

    /// That nothing was published since the queue was last emptied. A callback of its own goes the
    /// same way behind everything else, so that what came before it would be in the queue by now.
    pub(crate) async fn assert_nothing_queued(&self) {
        assert_eq!(self.post_ids(&[4_711]).await.status, 200);
        assert_eq!(self.ids().await, [4_711]);
    }
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// That it is a problem of `status` as RFC 9457 has it; gives its detail.
    pub(crate) fn assert_problem(&self, status: u16) -> &str {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        assert_problem_body(&self.body, status)
    }
}

pub(crate) fn assert_problem_body(body: &Value, status: u16) -> &str {
    let title = reqwest::StatusCode::from_u16(status).unwrap().canonical_reason().unwrap();
    assert_eq!(body["type"], "about:blank", "{body}");
    assert_eq!(body["title"], title, "{body}");
    assert_eq!(body["status"], status, "{body}");
    let detail = body["detail"].as_str().unwrap();
    assert!(!detail.is_empty(), "{body}");
    detail
}

/// The id in the body of a message, which must be exactly as the contract says.
pub(crate) fn id_in(body: &[u8]) -> i64 {
    let text = std::str::from_utf8(body).unwrap();
    let json: Value = serde_json::from_str(text).unwrap();
    let id = json["id"].as_i64().unwrap();
    assert_eq!(text, format!(r#"{{"id":{id}}}"#));
    id
}

pub(crate) fn client() -> reqwest::Client {
    // Only the first of the tests succeeds in this, and all of them mean the same provider.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap()
}

/// A connection to the shared broker, past the producer.
pub(crate) struct Broker {
    channel: Channel,
    _connection: Connection,
}

impl Broker {
    #[expect(clippy::disallowed_methods, reason = "the shared broker is there and answers")]
    pub(crate) async fn connect() -> Self {
        let properties = ConnectionProperties::default();
        let connection = Connection::connect(&amqp_uri(), properties).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        Self { channel, _connection: connection }
    }

    pub(crate) async fn delete_queue(&self, name: &str) {
        self.channel.queue_delete(name.into(), QueueDeleteOptions::default()).await.unwrap();
    }
}
