//! The client of the status API: `GET /objects/{id}` → `{"id":42,"online":true}`.

mod addresses;
mod answer;
mod connection;
mod http2;
mod pool;
mod reachability;
mod request;
mod response_head;

use std::io;
use std::time::{Duration, Instant};

use http::StatusCode;
use runtime::traces::{KeyValue, Span, SpanKind, Step};
use runtime::{CriticalTask, Status, Supervisor};
use tokio::sync::watch;
use tokio::time::timeout_at;
use url::Url;

use crate::config::{Lookups, Status404};
use addresses::Addresses;
use answer::{Excerpt, MAX_BODY_BYTES, ReceivedBody, ReceivedResponse};
use connection::ExchangeError;
use pool::{ConnectionPool, Exchange};
use reachability::{LastAnswer, NOT_CHECKED, monitor};
use request::RequestTemplate;
use response_head::ResponseHead;

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
    connections: ConnectionPool,
    requests: RequestTemplate,
    /// The server's attributes for spans.
    server_attributes: [KeyValue; 2],
    last_answer: LastAnswer,
    status: watch::Receiver<Status>,
    _monitor: CriticalTask,
}

impl StatusApi {
    /// # Errors
    /// When the URL is `https` and the system has no certificate authorities.
    pub(crate) fn new(
        lookups: &Lookups,
        breaker_status: watch::Receiver<Status>,
        supervisor: &Supervisor,
    ) -> anyhow::Result<Self> {
        let endpoint = &lookups.tester_endpoint;
        let (host, port) = host_and_port(endpoint);
        let addresses = Addresses::resolve(host.clone(), port);
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
            connections: ConnectionPool::new(endpoint, addresses, lookups.status_http2)?,
            requests: RequestTemplate::new(endpoint),
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

    /// Looks the object up. Adds attributes to `span`, and passes the context of `span` to the API.
    pub(crate) async fn look_up(
        &self,
        id: i64,
        limit: Duration,
        status_404: Status404,
        span: &mut Span,
    ) -> Result<Answer, LookupError> {
        let fetching = self.fetch(id, tokio::time::Instant::now() + limit, span);
        let received = fetching.await.map_err(|error| lookup_error(error, limit))?;
        let is_online = received.is_online(id, status_404)?;
        Ok(if is_online { Answer::Online(Instant::now()) } else { Answer::Offline })
    }

    async fn fetch(
        &self,
        id: i64,
        deadline: tokio::time::Instant,
        span: &mut Span,
    ) -> Result<ReceivedResponse, ExchangeError> {
        let request = self.requests.about(id, span.traceparent().as_deref());
        let (exchange, head) = by(deadline, self.connections.send(&request)).await?;
        drop(request);
        self.last_answer.record();
        span.set("http.response.status_code", i64::from(head.status.as_u16()));
        if head.status == StatusCode::NOT_FOUND {
            metrics::counter!(NOT_FOUND_METRIC).increment(1);
        }
        let body = self.receive_body(exchange, &head, deadline).await?;
        let ResponseHead { status, content_type, retry_after, .. } = head;
        Ok(ReceivedResponse { status, content_type, retry_after, body })
    }

    /// Receives the body, and keeps the connection for another lookup if possible. If the status
    /// says that the body only explains an error, which quotes it, waits only briefly for it, and the
    /// status counts even without it.
    async fn receive_body(
        &self,
        mut exchange: Exchange,
        head: &ResponseHead,
        deadline: tokio::time::Instant,
    ) -> Result<ReceivedBody, ExchangeError> {
        let mut body = ReceivedBody::default();
        let receiving = exchange.receive_body(head.body_length, &mut body);
        let has_ended = if matches!(head.status, StatusCode::OK | StatusCode::NOT_FOUND) {
            by(deadline, receiving).await?;
            true
        } else {
            let deadline = deadline.min(tokio::time::Instant::now() + ERROR_BODY_TIMEOUT);
            by(deadline, receiving).await.is_ok()
        };
        if has_ended
            && !body.is_truncated
            && head.keeps_alive
            && let Exchange::Http1(mut connection) = exchange
            && connection.finish_response()
        {
            self.connections.keep(connection);
        }
        Ok(body)
    }
}

/// Awaits a part of an exchange until the deadline.
async fn by<T>(
    deadline: tokio::time::Instant,
    part: impl Future<Output = Result<T, ExchangeError>>,
) -> Result<T, ExchangeError> {
    let ended = timeout_at(deadline, part).await;
    ended.unwrap_or_else(|_| Err(io::Error::from(io::ErrorKind::TimedOut).into()))
}

fn lookup_error(error: ExchangeError, limit: Duration) -> LookupError {
    match error {
        ExchangeError::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
            LookupError::Timeout(limit)
        }
        error => LookupError::Transport(error.to_string()),
    }
}

fn host_and_port(endpoint: &Url) -> (String, u16) {
    let host = endpoint.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    (host, endpoint.port_or_known_default().unwrap_or(80))
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use testkit::wait_for;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn status_of_an_error_counts_although_its_body_stalls() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("--tester-endpoint=http://{}", listener.local_addr().unwrap());
        let head =
            b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 10\r\ncontent-length: 5\r\n\r\n";
        let server = tokio::spawn(async move {
            let mut open = Vec::new();
            loop {
                let (mut connection, _) = listener.accept().await.unwrap();
                // An error means that the client has closed the connection.
                let _ = connection.write_all(head).await;
                open.push(connection);
            }
        });
        let (_breaker, breaker_status) = watch::channel(Ok(()));
        let lookups = Lookups::of(&[&endpoint]);
        let api = StatusApi::new(&lookups, breaker_status, &Supervisor::default()).unwrap();
        // The lookup ends before the wait for the body does.
        let limit = ERROR_BODY_TIMEOUT / 2;
        // On a busy machine, the head may arrive too late.
        let pause = wait_for("a lookup is asked to wait", async || {
            let looked_up = api.look_up(1, limit, Status404::Offline, &mut Span::default()).await;
            looked_up.unwrap_err().asks_to_wait()
        })
        .await;
        assert_eq!(pause, Duration::from_secs(10));
        server.abort();
    }
}
