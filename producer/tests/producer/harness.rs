//! A producer within the test process, and the messages in its queue.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use lapin::message::BasicGetMessage;
use producer::CallbackServer;
use reqwest::header::HeaderMap;
use runtime::{CancellationToken, Context, Health, Supervisor, settings};
use serde_json::Value;
use testkit::{Proxy, Queue, Reply, Scratch, amqp_uri, http_client, parse, wait_until};
use tokio::task::JoinHandle;

use crate::DEADLINE;

/// The time that the client of a callback waits for its response.
pub(crate) const CLIENT_TIMEOUT: Duration = Duration::from_secs(1);

/// The defaults, changed by `arguments`. Tests may set a longer `PUBLISH_TIMEOUT` than operators
/// may, because the broker of a busy machine confirms slowly.
pub(crate) fn config(arguments: &[String]) -> producer::Config {
    let timeout =
        |argument: &String| argument.strip_prefix("--publish-timeout=").map(str::to_owned);
    let others = arguments.iter().filter(|argument| timeout(argument).is_none());
    let mut config: producer::Config = parse(others);
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
    pub(crate) shutdown: CancellationToken,
    pub(crate) supervisor: Supervisor,
    pub(crate) run: JoinHandle<anyhow::Result<()>>,
    pub(crate) queue: Queue,
    pub(crate) amqp_uri: String,
    scratch: Scratch,
    client: reqwest::Client,
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
    /// Starts a producer that is connected to the shared broker, with a `PUBLISH_TIMEOUT` that is
    /// long enough for a busy machine.
    pub(crate) async fn start(arguments: &[&str]) -> Self {
        let mut all = vec!["--publish-timeout=10s"];
        if arguments.iter().any(|argument| argument.starts_with("--publish-timeout")) {
            all.clear();
        }
        all.extend(arguments);
        let producer = Self::start_at(&amqp_uri(), &all).await;
        producer.ready().await;
        wait_until("the producer is connected to its broker", async || {
            producer.health.missing_optional().is_empty()
        })
        .await;
        producer
    }

    /// Starts a producer whose broker is at `amqp_uri`.
    pub(crate) async fn start_at(amqp_uri: &str, arguments: &[&str]) -> Self {
        Self::start_with(Queue::new(), Scratch::new("spool"), amqp_uri, arguments).await
    }

    /// Starts a producer behind a proxy to the shared broker.
    pub(crate) async fn behind_proxy(arguments: &[&str]) -> (Proxy, Self) {
        let (proxy, uri) = Proxy::before(&amqp_uri()).await;
        (proxy, Self::start_at(&uri, arguments).await)
    }

    /// Starts a producer behind a proxy that closes all connections.
    pub(crate) async fn without_broker(arguments: &[&str]) -> (Proxy, Self) {
        let (proxy, uri) = Proxy::before(&amqp_uri()).await;
        proxy.cut();
        (proxy, Self::start_at(&uri, arguments).await)
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
        let context = Context::default();
        let producer::Config { callbacks, authenticity, broker } = config(&all);
        let broker = broker.open(&context.supervisor).unwrap();
        let opening = CallbackServer::open(callbacks, authenticity, broker, context.clone());
        let server = opening.await.unwrap();
        let address = server.address().unwrap();
        let run = tokio::spawn(server.serve());
        let Context { health, shutdown, supervisor } = context;
        let (client, amqp_uri) = (http_client(DEADLINE), amqp_uri.to_owned());
        Self { address, health, shutdown, supervisor, run, queue, amqp_uri, scratch, client }
    }

    /// Stops this producer, and starts another one on the same queue and spool.
    pub(crate) async fn restart(self) -> Self {
        self.shutdown.cancel();
        self.run.await.unwrap().unwrap();
        Self::start_with(self.queue, self.scratch, &self.amqp_uri, &[]).await
    }

    /// The directory that contains the producer's `SPOOL_DIR`.
    pub(crate) fn directory(&self) -> &Path {
        self.scratch.path()
    }

    pub(crate) async fn ready(&self) {
        wait_until("the producer is ready", async || self.health.missing().is_empty()).await;
    }

    /// Waits until the producer is connected to the broker. It can be ready without a connection.
    pub(crate) async fn connected(&self) {
        wait_until("the producer is connected to its broker", async || {
            self.health.missing_optional().iter().all(|(name, _)| *name != "broker")
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
        self.queue.take_all(&self.queue.name).await
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
        wait_until("all accepted ids are in the queue", async || {
            for id in self.ids().await {
                *arrived.entry(id).or_default() += 1;
            }
            wanted.iter().all(|id| arrived.contains_key(id))
        })
        .await;
        arrived
    }

    /// Asserts that nothing was published since the queue was last emptied. To be sure, posts one
    /// more callback: messages of earlier callbacks would be in the queue before its message.
    pub(crate) async fn assert_nothing_queued(&self) {
        assert_eq!(self.post_ids(&[4_711]).await.status, 200);
        assert_eq!(self.ids().await, [4_711]);
    }
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Asserts that the response is a problem (RFC 9457) with `status`, and returns its detail.
    pub(crate) fn assert_problem(&self, status: u16) -> &str {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), "application/problem+json");
        assert_problem_body(&self.body, status)
    }
}

/// Asserts that the response is a problem with `status` whose detail contains `reason`.
pub(crate) fn assert_problem_reply(reply: &Reply, status: u16, reason: &str) {
    assert_eq!(reply.status, status, "{reply:?}");
    assert!(reply.head.contains("content-type: application/problem+json\r\n"), "{reply:?}");
    let body: Value = serde_json::from_str(&reply.body).unwrap();
    assert!(assert_problem_body(&body, status).contains(reason), "{reply:?}");
}

fn assert_problem_body(body: &Value, status: u16) -> &str {
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
