//! Helpers of the tests: settings from flags, a client, and a callback endpoint that records
//! requests.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::post;
use runtime::CancellationToken;
use runtime::http::{Limits, serve};
use tester::config::Config;
use testkit::http_client;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

/// Longer than any wait of a test takes, so that only a failing test reaches it.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Parses the settings from `flags`.
pub(crate) fn settings(flags: &[&str]) -> Config {
    testkit::parse(flags)
}

pub(crate) fn client() -> reqwest::Client {
    http_client(DEADLINE)
}

/// Awaits `future` for at most [`DEADLINE`].
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("the deadline has passed")
}

/// A callback endpoint that gives each callback the same response and records its headers and body.
pub(crate) struct Endpoint {
    pub(crate) address: SocketAddr,
    requests: mpsc::UnboundedReceiver<(HeaderMap, String)>,
    stop: CancellationToken,
}

#[derive(Clone)]
struct Behaviour {
    status: StatusCode,
    /// The delay of the responses to the first `slow_ones` requests.
    delay: Duration,
    slow_ones: u64,
    seen: Arc<AtomicU64>,
    requests: mpsc::UnboundedSender<(HeaderMap, String)>,
}

impl Endpoint {
    /// Responds with this status at once.
    pub(crate) async fn answering(status: u16) -> Self {
        Self::start(status, Duration::ZERO, 0).await
    }

    /// Responds with 200 to the first `slow_ones` callbacks after `delay`, and to the others at
    /// once.
    pub(crate) async fn slow(delay: Duration, slow_ones: u64) -> Self {
        Self::start(200, delay, slow_ones).await
    }

    async fn start(status: u16, delay: Duration, slow_ones: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, requests) = mpsc::unbounded_channel();
        let status = StatusCode::from_u16(status).unwrap();
        let behaviour =
            Behaviour { status, delay, slow_ones, seen: Arc::default(), requests: sender };
        let router = Router::new().route("/callback", post(callback)).with_state(behaviour);
        let limits = Limits { max_connections: 100, header_timeout: DEADLINE, ..Limits::default() };
        let stop = CancellationToken::new();
        tokio::spawn(serve(listener, router, limits, stop.clone()));
        Self { address, requests, stop }
    }

    /// Waits for the next callback, and returns its ids.
    pub(crate) async fn next_ids(&mut self) -> Vec<i64> {
        let (_, body) = self.next_request().await;
        ids_of(&body)
    }

    /// Waits for the next callback, and returns its headers and body.
    pub(crate) async fn next_request(&mut self) -> (HeaderMap, String) {
        soon(self.requests.recv()).await.unwrap()
    }

    /// The ids of all callbacks received since the last call.
    pub(crate) fn all_ids(&mut self) -> Vec<Vec<i64>> {
        let requests = std::iter::from_fn(|| self.requests.try_recv().ok());
        requests.map(|(_, body)| ids_of(&body)).collect()
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn callback(
    State(behaviour): State<Behaviour>,
    headers: HeaderMap,
    body: String,
) -> StatusCode {
    behaviour.requests.send((headers, body)).ok();
    if behaviour.seen.fetch_add(1, Ordering::Relaxed) < behaviour.slow_ones {
        tokio::time::sleep(behaviour.delay).await;
    }
    behaviour.status
}

fn ids_of(body: &str) -> Vec<i64> {
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    let ids = body["object_ids"].as_array().unwrap();
    ids.iter().map(|id| id.as_i64().unwrap()).collect()
}
