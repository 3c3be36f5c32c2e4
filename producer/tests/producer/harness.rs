//! A producer within the test process, and the messages in its queue.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Parser as _;
use lapin::message::BasicGetMessage;
use lapin::options::{BasicGetOptions, QueueDeleteOptions};
use lapin::{Channel, Connection, ConnectionProperties};
use producer::CallbackServer;
use reqwest::header::HeaderMap;
use serde_json::Value;
use service::{CancellationToken, Health, settings};
use testbed::{Queue, Scratch, amqp_uri, eventually};
use tokio::task::JoinHandle;

/// Far longer than any wait here needs, because a machine that runs all tests at once is slow.
pub(crate) use crate::wire::DEADLINE;
/// The time that the client of a callback waits for its response.
pub(crate) const CLIENT_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    config: producer::Config,
}

/// The defaults, changed by `arguments`. Tests may set a longer `PUBLISH_TIMEOUT` than operators
/// may, for the broker of a busy machine.
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

/// A producer on a free port, with its own queue.
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

/// The response to a callback.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
    pub(crate) took: Duration,
}

impl Producer {
    /// Starts a producer that is connected to the shared broker, with time for a busy machine.
    pub(crate) async fn start(arguments: &[&str]) -> Self {
        let mut all = vec!["--publish-timeout=10s"];
        if arguments.iter().any(|argument| argument.starts_with("--publish-timeout")) {
            all.clear();
        }
        all.extend(arguments);
        let producer = Self::start_at(&amqp_uri(), &all).await;
        producer.ready().await;
        eventually("the producer is connected to its broker", DEADLINE, async || {
            producer.health.missing_optional().is_empty().then_some(())
        })
        .await;
        producer
    }

    /// Starts a producer whose broker is at `amqp_uri`.
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
        let callbacks = CallbackServer::open(&config(&all), &health).await.unwrap();
        let address = callbacks.address().unwrap();
        let shutdown = Shutdown(CancellationToken::new());
        let served = tokio::spawn(callbacks.serve(shutdown.0.clone()));
        Self { address, health, shutdown, served, queue, scratch, client: client() }
    }

    /// Stops it, and starts another producer on the same queue and spool.
    pub(crate) async fn restart(self, amqp_uri: &str, arguments: &[&str]) -> Self {
        let Self { shutdown, served, queue, scratch, .. } = self;
        shutdown.cancel();
        served.await.unwrap().unwrap();
        Self::start_with(queue, scratch, amqp_uri, arguments).await
    }

    /// The directory that contains its `SPOOL_DIR`.
    pub(crate) fn directory(&self) -> &Path {
        self.scratch.path()
    }

    pub(crate) async fn ready(&self) {
        eventually("the producer is ready", DEADLINE, async || {
            self.health.missing().is_empty().then_some(())
        })
        .await;
    }

    /// Waits until it is connected to the broker. It can be ready without that.
    pub(crate) async fn connected(&self) {
        eventually("the producer is connected to its broker", DEADLINE, async || {
            self.health.missing_optional().iter().all(|(name, _)| *name != "broker").then_some(())
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

    /// Removes all messages from the queue, and returns them.
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

    /// Removes all messages from the queue, and returns their ids in ascending order.
    pub(crate) async fn ids(&self) -> Vec<i64> {
        let messages = self.messages().await;
        let mut ids: Vec<i64> = messages.iter().map(|m| id_in(&m.delivery.data)).collect();
        ids.sort_unstable();
        ids
    }

    /// Removes messages from the queue until each of `wanted` has arrived. Returns how often each
    /// arrived.
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

    /// Asserts that nothing was published since the queue was last emptied. It posts a callback:
    /// messages of earlier callbacks would be in the queue before this one's.
    pub(crate) async fn assert_nothing_queued(&self) {
        assert_eq!(self.post_ids(&[4_711]).await.status, 200);
        assert_eq!(self.ids().await, [4_711]);
    }
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Asserts that it is a problem (RFC 9457) with `status`, and returns its detail.
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

/// The id in the body of a message, whose form must be exactly as documented.
pub(crate) fn id_in(body: &[u8]) -> i64 {
    let text = std::str::from_utf8(body).unwrap();
    let json: Value = serde_json::from_str(text).unwrap();
    let id = json["id"].as_i64().unwrap();
    assert_eq!(text, format!(r#"{{"id":{id}}}"#));
    id
}

pub(crate) fn client() -> reqwest::Client {
    // Only the first test installs the provider; it is the same one for all tests.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().timeout(DEADLINE).build().unwrap()
}

/// A direct connection to the shared broker.
pub(crate) struct Broker {
    channel: Channel,
    _connection: Connection,
}

impl Broker {
    #[expect(clippy::disallowed_methods, reason = "the shared broker always responds")]
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
