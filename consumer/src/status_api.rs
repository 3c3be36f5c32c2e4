//! The client of the status API: `GET /objects/{id}` → `{"id":42,"online":true}`.

mod addresses;
mod answer;
mod connections;
mod reachability;

use std::time::{Duration, Instant};

use reqwest::{Client, Response, StatusCode, Url, redirect};
use runtime::traces::{KeyValue, Span, SpanKind, Step, TRACEPARENT};
use runtime::{CriticalTask, Status, Supervisor};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::config::Lookups;
use addresses::Addresses;
use answer::{Excerpt, MAX_BODY_BYTES, ReceivedResponse};
use connections::{IDLE_TIMEOUT, UsedConnections};
use reachability::{LastAnswer, NOT_CHECKED, monitor};

/// How long to wait for the body of an error response, which is only quoted.
const ERROR_BODY_TIMEOUT: Duration = Duration::from_millis(200);
const MAX_CONNECT_TIME: Duration = Duration::from_secs(3);

/// Counts every 404, whether it means offline or is a failed lookup.
pub(crate) const NOT_FOUND_METRIC: &str = "lastseen_lookups_not_found_total";

/// What the status API says about an object.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    /// Online at this time, when the client had received the whole answer.
    Online(Instant),
    /// Offline, or unknown to the API.
    Offline,
}

/// A failed lookup: it is unknown whether the object is online.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("no answer: {0}")]
    Transport(String),
    #[error("answered {status} ({response})")]
    Status { status: StatusCode, retry_after: Option<Duration>, response: Excerpt },
    #[error("answered 404 Not Found, which does not mean offline: {reason} ({response})")]
    NotFound { reason: &'static str, response: Excerpt },
    #[error("the answer is larger than {MAX_BODY_BYTES} bytes (200 OK, {0})")]
    TooLarge(Excerpt),
    #[error("the answer is not {{\"id\":…,\"online\":…}}: {reason} (200 OK, {response})")]
    Garbage { reason: String, response: Excerpt },
    #[error("the answer is about another object, {id} (200 OK, {response})")]
    WrongId { id: i64, response: Excerpt },
}

impl LookupError {
    pub(crate) const LABELS: [&str; 7] =
        ["timeout", "transport", "throttled", "status", "not_found", "garbage", "wrong_id"];

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

    /// The pause that the API asks for, if it does: with a 429, and with a 503 that has a
    /// `Retry-After` header.
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

    /// The wait that the `Retry-After` header asks for, capped at a minute.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

pub(crate) struct StatusApi {
    client: Client,
    /// For a lookup that is sent again. This client keeps no idle connections, so it never reuses
    /// one.
    without_reuse: Client,
    used_connections: UsedConnections,
    endpoint: String,
    /// The server's attributes for spans.
    server_attributes: [KeyValue; 2],
    last_answer: LastAnswer,
    status: watch::Receiver<Status>,
    _monitor: CriticalTask,
}

impl StatusApi {
    /// # Errors
    /// When the HTTP client cannot be built, for example without the certificates of the system.
    pub(crate) fn new(
        config: &Lookups,
        breaker_status: watch::Receiver<Status>,
        supervisor: &Supervisor,
    ) -> Result<Self, reqwest::Error> {
        let (host, port) = host_and_port(&config.tester_endpoint);
        let addresses = Addresses::resolve(host.clone(), port);
        let client = || {
            Client::builder()
                .connect_timeout(MAX_CONNECT_TIME)
                .dns_resolver(addresses.clone())
                .redirect(redirect::Policy::none())
                .no_proxy()
                .http1_only()
                .user_agent(concat!("lastseen/", env!("CARGO_PKG_VERSION")))
        };
        let (sender, status) = watch::channel(Err(NOT_CHECKED.to_owned()));
        let last_answer = LastAnswer::default();
        let monitor = monitor(
            format!("{host}:{port}"),
            addresses.clone(),
            last_answer.clone(),
            breaker_status,
            sender,
        );
        let monitor = supervisor.spawn_critical("status API monitor", monitor);
        let server_attributes =
            [KeyValue::new("server.address", host), KeyValue::new("server.port", i64::from(port))];
        Ok(Self {
            client: client().pool_idle_timeout(IDLE_TIMEOUT).build()?,
            without_reuse: client().pool_max_idle_per_host(0).build()?,
            used_connections: UsedConnections::default(),
            endpoint: config.tester_endpoint.as_str().trim_end_matches('/').to_owned(),
            server_attributes,
            last_answer,
            status,
            _monitor: monitor,
        })
    }

    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    pub(crate) fn step(&self, id: i64) -> Step {
        let mut attributes = vec![
            KeyValue::new("http.request.method", "GET"),
            KeyValue::new("url.template", "/objects/{id}"),
            KeyValue::new("lastseen.object_id", id),
        ];
        attributes.extend_from_slice(&self.server_attributes);
        Step { name: "GET /objects/{id}".into(), kind: SpanKind::Client, attributes }
    }

    /// Looks the object up within `lookups.status_timeout`. Adds attributes to `span`, and passes
    /// the context of `span` to the API.
    pub(crate) async fn look_up(
        &self,
        id: i64,
        lookups: &Lookups,
        span: &mut Span,
    ) -> Result<Answer, LookupError> {
        let timeout = lookups.status_timeout;
        let response =
            self.send(id, timeout, span).await.map_err(|error| transport_error(error, timeout))?;
        self.last_answer.record();
        let status = response.status();
        span.set("http.response.status_code", i64::from(status.as_u16()));
        if status == StatusCode::NOT_FOUND {
            metrics::counter!(NOT_FOUND_METRIC).increment(1);
        }
        let received = receive(response).await.map_err(|error| transport_error(error, timeout))?;
        let is_online = received.is_online(id, lookups.status_404)?;
        Ok(if is_online { Answer::Online(Instant::now()) } else { Answer::Offline })
    }

    async fn send(&self, id: i64, timeout: Duration, span: &Span) -> reqwest::Result<Response> {
        let started = Instant::now();
        let url = format!("{}/objects/{id}", self.endpoint);
        let get = |client: &Client, timeout| {
            let mut request = client.get(&url).timeout(timeout);
            if let Some(traceparent) = span.traceparent() {
                request = request.header(TRACEPARENT, traceparent);
            }
            request.send()
        };
        let mut sent = get(&self.client, timeout).await;
        if let Err(error) = &sent
            && self.used_connections.ended_before_response(error)
        {
            tracing::debug!(
                id,
                "the status API closed an idle connection; sending the lookup again"
            );
            sent = get(&self.without_reuse, timeout.saturating_sub(started.elapsed())).await;
        }
        if let Ok(response) = &sent {
            self.used_connections.record(response.extensions().get(), timeout);
        }
        sent
    }
}

/// Reads a response. If the status says that the body has the answer, reads up to
/// [`MAX_BODY_BYTES`] of the body. Otherwise waits only briefly, because an error only quotes it.
async fn receive(mut response: Response) -> reqwest::Result<ReceivedResponse> {
    let status = response.status();
    let mut received = ReceivedResponse {
        status,
        headers: std::mem::take(response.headers_mut()),
        body: Vec::new(),
        is_truncated: false,
    };
    let reading = read_body(&mut response, &mut received);
    if matches!(status, StatusCode::OK | StatusCode::NOT_FOUND) {
        reading.await?;
    } else {
        _ = timeout(ERROR_BODY_TIMEOUT, reading).await;
    }
    Ok(received)
}

async fn read_body(
    response: &mut Response,
    received: &mut ReceivedResponse,
) -> reqwest::Result<()> {
    while let Some(chunk) = response.chunk().await? {
        let remaining = MAX_BODY_BYTES.saturating_sub(received.body.len());
        received.body.extend_from_slice(&chunk[..chunk.len().min(remaining)]);
        if chunk.len() > remaining {
            received.is_truncated = true;
            break;
        }
    }
    Ok(())
}

/// Takes the text of the innermost source, because reqwest's own text names the operation, not the
/// cause. Omits the URL, which may contain a password.
fn transport_error(error: reqwest::Error, timeout: Duration) -> LookupError {
    if error.is_timeout() {
        return LookupError::Timeout(timeout);
    }
    LookupError::Transport(anyhow::Error::new(error.without_url()).root_cause().to_string())
}

fn host_and_port(endpoint: &Url) -> (String, u16) {
    let host = endpoint.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    (host, endpoint.port_or_known_default().unwrap_or(80))
}

#[cfg(test)]
mod properties;
