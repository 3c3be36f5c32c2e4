//! The client of the status API: `GET /objects/{id}` → `{"id":42,"online":true}`.

mod addresses;
mod answer;
mod connections;
mod reachability;

use std::error::Error as _;
use std::time::{Duration, Instant};

use reqwest::{Client, Response, StatusCode, Url, redirect};
use service::traces::{KeyValue, Span, SpanKind, Step, TRACEPARENT};
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::config::Lookups;
use addresses::Addresses;
use answer::{Excerpt, MAX_BODY_BYTES, Received};
use connections::{IDLE_TIMEOUT, UsedConnections};
use reachability::{LastAnswer, NOT_YET, probe};

/// How long to wait for the body of an error, which is only quoted.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_millis(200);
const MAX_CONNECT_TIME: Duration = Duration::from_secs(3);

/// Counts every 404, whether it says "offline" or is a failed lookup.
pub(crate) const NOT_FOUND_METRIC: &str = "lastseen_lookups_not_found_total";

/// What the status API knows about an object.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    /// Online, at the moment when the answer was complete.
    Online(Instant),
    /// Offline, or unknown to the API.
    Offline,
}

/// A lookup after which nobody knows whether the object is online.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("no answer: {0}")]
    Transport(String),
    #[error("answered {status} ({response})")]
    Status { status: StatusCode, retry_after: Option<Duration>, response: Excerpt },
    #[error("answered 404 Not Found, which does not say offline: {reason} ({response})")]
    NotFound { reason: &'static str, response: Excerpt },
    #[error("the answer is over {MAX_BODY_BYTES} bytes (200 OK, {0})")]
    TooLarge(Excerpt),
    #[error("the answer is not {{\"id\":…,\"online\":…}}: {reason} (200 OK, {response})")]
    Garbage { reason: String, response: Excerpt },
    #[error("the answer is about object {id} (200 OK, {response})")]
    WrongId { id: i64, response: Excerpt },
}

impl LookupError {
    /// The labels of all failures in metrics.
    pub(crate) const LABELS: [&str; 7] =
        ["timeout", "transport", "throttled", "status", "not_found", "garbage", "wrong_id"];

    /// The label of this failure in metrics.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Timeout(_) => "timeout",
            Self::Transport(_) => "transport",
            Self::Status { status, .. } if *status == StatusCode::TOO_MANY_REQUESTS => "throttled",
            Self::Status { .. } => "status",
            Self::NotFound { .. } => "not_found",
            Self::TooLarge(_) | Self::Garbage { .. } => "garbage",
            Self::WrongId { .. } => "wrong_id",
        }
    }

    /// How long the API asks all lookups to wait: always with 429, and with 503 if it sends a
    /// `Retry-After`.
    pub(crate) fn asks_to_wait(&self) -> Option<Duration> {
        match self {
            Self::Status { status: StatusCode::TOO_MANY_REQUESTS, retry_after, .. } => {
                Some(retry_after.unwrap_or_default())
            }
            Self::Status { status: StatusCode::SERVICE_UNAVAILABLE, retry_after, .. } => {
                *retry_after
            }
            _ => None,
        }
    }

    /// The wait that the API asked for, a minute at most.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

/// Whether an HTTP server can be reached at the API's address, and answers lookups.
type Reachable = Result<(), String>;

pub(crate) struct StatusApi {
    client: Client,
    /// For a lookup that is sent once more: it keeps no connections, so it never reuses one.
    without_reuse: Client,
    used_connections: UsedConnections,
    endpoint: String,
    /// The server's attributes in traces.
    server: [KeyValue; 2],
    last_answer: LastAnswer,
    status: watch::Receiver<Reachable>,
    _probe: AbortOnDropHandle<()>,
}

impl StatusApi {
    /// # Errors
    /// When the HTTP client cannot be set up, for instance without the system's certificates.
    pub(crate) fn new(
        config: &Lookups,
        by_lookups: watch::Receiver<Reachable>,
    ) -> Result<Self, reqwest::Error> {
        let (host, port) = host_and_port(&config.tester_endpoint);
        let addresses = Addresses::of(host.clone(), port);
        let client = || {
            Client::builder()
                .connect_timeout(MAX_CONNECT_TIME)
                .dns_resolver(addresses.clone())
                .redirect(redirect::Policy::none())
                .no_proxy()
                .http1_only()
                .user_agent(concat!("lastseen/", env!("CARGO_PKG_VERSION")))
        };
        let (sender, status) = watch::channel(Err(NOT_YET.to_owned()));
        let last_answer = LastAnswer::default();
        let probe = AbortOnDropHandle::new(tokio::spawn(probe(
            format!("{host}:{port}"),
            addresses.clone(),
            last_answer.clone(),
            by_lookups,
            sender,
        )));
        let server =
            [KeyValue::new("server.address", host), KeyValue::new("server.port", i64::from(port))];
        Ok(Self {
            client: client().pool_idle_timeout(IDLE_TIMEOUT).build()?,
            without_reuse: client().pool_max_idle_per_host(0).build()?,
            used_connections: UsedConnections::default(),
            endpoint: config.tester_endpoint.as_str().trim_end_matches('/').to_owned(),
            server,
            last_answer,
            status,
            _probe: probe,
        })
    }

    pub(crate) fn status(&self) -> watch::Receiver<Reachable> {
        self.status.clone()
    }

    /// A lookup, as traces have it.
    pub(crate) fn step(&self, id: i64) -> Step {
        let mut attributes = vec![
            KeyValue::new("http.request.method", "GET"),
            KeyValue::new("url.template", "/objects/{id}"),
            KeyValue::new("lastseen.object_id", id),
        ];
        attributes.extend_from_slice(&self.server);
        Step { name: "GET /objects/{id}".into(), kind: SpanKind::Client, attributes }
    }

    /// Asks whether the object is online, as a part of `span`, within `lookups.status_timeout`.
    ///
    /// # Errors
    /// [`LookupError`] for every response that says neither online nor offline; worth another attempt.
    pub(crate) async fn look_up(
        &self,
        id: i64,
        lookups: &Lookups,
        span: &mut Span,
    ) -> Result<Answer, LookupError> {
        let limit = lookups.status_timeout;
        let response = self.send(id, limit, span).await.map_err(|error| transport(error, limit))?;
        self.last_answer.note();
        let status = response.status();
        span.set("http.response.status_code", i64::from(status.as_u16()));
        if status == StatusCode::NOT_FOUND {
            metrics::counter!(NOT_FOUND_METRIC).increment(1);
        }
        let received = receive(response).await.map_err(|error| transport(error, limit))?;
        let is_online = received.online(id, lookups.status_404)?;
        Ok(if is_online { Answer::Online(Instant::now()) } else { Answer::Offline })
    }

    async fn send(&self, id: i64, limit: Duration, span: &Span) -> reqwest::Result<Response> {
        let started = Instant::now();
        let url = format!("{}/objects/{id}", self.endpoint);
        let get = |client: &Client, limit| {
            let mut request = client.get(&url).timeout(limit);
            if let Some(traceparent) = span.traceparent() {
                request = request.header(TRACEPARENT, traceparent);
            }
            request.send()
        };
        let mut sent = get(&self.client, limit).await;
        if let Err(error) = &sent
            && self.used_connections.ended_before_response(error)
        {
            tracing::debug!(
                id,
                "the status API closed an idle connection; sending the lookup again"
            );
            sent = get(&self.without_reuse, limit.saturating_sub(started.elapsed())).await;
        }
        if let Ok(response) = &sent {
            self.used_connections.note(response.extensions().get(), limit);
        }
        sent
    }
}

/// Reads the response: the body up to [`MAX_BODY_BYTES`] where the answer is in it. Of another status, it
/// waits only shortly for the body, which an error quotes.
async fn receive(mut response: Response) -> reqwest::Result<Received> {
    let status = response.status();
    let mut received = Received {
        status,
        headers: std::mem::take(response.headers_mut()),
        body: Vec::new(),
        is_truncated: false,
    };
    let whole = read(&mut response, &mut received);
    if matches!(status, StatusCode::OK | StatusCode::NOT_FOUND) {
        whole.await?;
    } else {
        _ = timeout(ERROR_BODY_TIMEOUT, whole).await;
    }
    Ok(received)
}

async fn read(response: &mut Response, received: &mut Received) -> reqwest::Result<()> {
    while let Some(chunk) = response.chunk().await? {
        let room = MAX_BODY_BYTES.saturating_sub(received.body.len());
        received.body.extend_from_slice(&chunk[..chunk.len().min(room)]);
        if chunk.len() > room {
            received.is_truncated = true;
            break;
        }
    }
    Ok(())
}

/// reqwest's own text says what it did, not what went wrong; that is at the end of its sources.
/// The URL is left out, since it may hold a password.
fn transport(error: reqwest::Error, limit: Duration) -> LookupError {
    if error.is_timeout() {
        return LookupError::Timeout(limit);
    }
    let error = error.without_url();
    let mut cause = error.source();
    while let Some(deeper) = cause.and_then(std::error::Error::source) {
        cause = Some(deeper);
    }
    LookupError::Transport(cause.map_or_else(|| error.to_string(), ToString::to_string))
}

fn host_and_port(endpoint: &Url) -> (String, u16) {
    let host = endpoint.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    (host, endpoint.port_or_known_default().unwrap_or(80))
}

#[cfg(test)]
mod properties;
