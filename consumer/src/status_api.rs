//! The client of the status API: `GET /objects/{id}` → `{"id":42,"online":true}`.

use std::error::Error as _;
use std::io;
use std::time::{Duration, Instant, SystemTime};

use reqwest::header::RETRY_AFTER;
use reqwest::{Client, Response, StatusCode, Url, redirect};
use serde::Deserialize;
use serde::de::Error as _;
use service::traces::{KeyValue, Span, SpanKind, Step, TRACEPARENT};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::config::Lookups;

/// A right answer has some 30 bytes; whatever is far above is not read to its end.
const MAX_BODY_BYTES: usize = 16 * 1024;
const MAX_CONNECT_TIME: Duration = Duration::from_secs(3);
const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// Why it is not reachable before the first attempt.
const NOT_YET: &str = "not asked yet";

/// What the status API knows of an object.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    /// Online, at the moment when the answer had come.
    Online(Instant),
    /// Offline, or not known to the API.
    Offline,
}

/// A lookup that told nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LookupError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("no answer: {0}")]
    Transport(String),
    #[error("answered {status}")]
    Status { status: StatusCode, retry_after: Option<Duration> },
    #[error("the answer is over {MAX_BODY_BYTES} bytes")]
    TooLarge,
    #[error("the answer is not {{\"id\":…,\"online\":…}}: {0}")]
    Garbage(#[from] serde_json::Error),
    #[error("the answer is about object {0}")]
    WrongId(i64),
}

impl LookupError {
    /// All labels that there are.
    pub(crate) const LABELS: [&str; 6] =
        ["timeout", "transport", "throttled", "status", "garbage", "wrong_id"];

    /// The label of this failure in metrics.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Timeout(_) => "timeout",
            Self::Transport(_) => "transport",
            Self::Status { status, .. } if *status == StatusCode::TOO_MANY_REQUESTS => "throttled",
            Self::Status { .. } => "status",
            Self::TooLarge | Self::Garbage(_) => "garbage",
            Self::WrongId(_) => "wrong_id",
        }
    }

    /// For how long the API asks to be left alone, by everybody: with 429 always, and with 503 if it
    /// says so.
    pub(crate) fn asks_to_wait(&self) -> Option<Duration> {
        match self {
            Self::Status { status: StatusCode::TOO_MANY_REQUESTS, retry_after } => {
                Some(retry_after.unwrap_or_default())
            }
            Self::Status { status: StatusCode::SERVICE_UNAVAILABLE, retry_after } => *retry_after,
            _ => None,
        }
    }

    /// The wait that the API asked for.
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
    endpoint: String,
    /// Who answers, as traces have it.
    server: [KeyValue; 2],
    status: watch::Receiver<Reachable>,
    _probe: AbortOnDropHandle<()>,
}

#[derive(Deserialize)]
struct Body {
    id: i64,
    online: bool,
}

impl StatusApi {
    /// # Errors
    /// When the HTTP client cannot be set up, for instance without the system's certificates.
    pub(crate) fn new(
        config: &Lookups,
        by_lookups: watch::Receiver<Reachable>,
    ) -> Result<Self, reqwest::Error> {
        let client = Client::builder()
            .connect_timeout(MAX_CONNECT_TIME)
            .redirect(redirect::Policy::none())
            .no_proxy()
            .http1_only()
            .user_agent(concat!("lastseen/", env!("CARGO_PKG_VERSION")))
            .build()?;
        let (sender, status) = watch::channel(Err(NOT_YET.to_owned()));
        let probe = AbortOnDropHandle::new(tokio::spawn(probe(
            config.tester_endpoint.clone(),
            by_lookups,
            sender,
        )));
        let (host, port) = host_and_port(&config.tester_endpoint);
        let server =
            [KeyValue::new("server.address", host), KeyValue::new("server.port", i64::from(port))];
        Ok(Self {
            client,
            server,
            endpoint: config.tester_endpoint.as_str().trim_end_matches('/').to_owned(),
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

    /// Asks whether the object is online, for so long at most, as a part of `span`.
    ///
    /// # Errors
    /// [`LookupError`] for whatever says neither online nor offline; worth another try.
    pub(crate) async fn look_up(
        &self,
        id: i64,
        limit: Duration,
        span: &mut Span,
    ) -> Result<Answer, LookupError> {
        let url = format!("{}/objects/{id}", self.endpoint);
        let mut request = self.client.get(url).timeout(limit);
        if let Some(traceparent) = span.traceparent() {
            request = request.header(TRACEPARENT, traceparent);
        }
        let response = request.send().await.map_err(|error| transport(error, limit))?;
        span.set("http.response.status_code", i64::from(response.status().as_u16()));
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(Answer::Offline),
            status => {
                return Err(LookupError::Status { status, retry_after: retry_after(&response) });
            }
        }
        let answer = read(response).await.map_err(|error| transport(error, limit))?;
        let online = online(id, &answer.ok_or(LookupError::TooLarge)?)?;
        Ok(if online { Answer::Online(Instant::now()) } else { Answer::Offline })
    }
}

/// The body, unless it is too large.
async fn read(mut response: Response) -> reqwest::Result<Option<Vec<u8>>> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > MAX_BODY_BYTES {
            return Ok(None);
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Some(body))
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

/// Whether an answer says that this object is online.
fn online(id: i64, answer: &[u8]) -> Result<bool, LookupError> {
    // Without this, serde would take the bare list `[42,true]` for the object's fields in order.
    if answer.trim_ascii_start().first() != Some(&b'{') {
        return Err(serde_json::Error::custom("it is no JSON object").into());
    }
    let body: Body = serde_json::from_slice(answer)?;
    if body.id != id {
        return Err(LookupError::WrongId(body.id));
    }
    Ok(body.online)
}

/// `Retry-After`, in seconds or as a date; one that has passed is no wait.
fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim();
    let seconds = value.parse().ok().map(Duration::from_secs);
    let until = || httpdate::parse_http_date(value).ok();
    seconds.or_else(|| until().map(|at| at.duration_since(SystemTime::now()).unwrap_or_default()))
}

/// Keeps `status` true: what the lookups say, which is bad news only; and by itself whether the API
/// can be reached, so that readiness does not depend on there being something to look up.
async fn probe(
    endpoint: Url,
    mut by_lookups: watch::Receiver<Reachable>,
    status: watch::Sender<Reachable>,
) {
    let (host, port) = host_and_port(&endpoint);
    let mut before = Err(NOT_YET.to_owned());
    loop {
        let connected = timeout(MAX_CONNECT_TIME, TcpStream::connect((host.as_str(), port))).await;
        let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let reachable =
            connected.map(drop).map_err(|error| format!("cannot reach {host}:{port}: {error}"));
        match &reachable {
            // Once for each outage; the first attempt of all counts as one.
            Err(reason) if before.is_ok() || before == Err(NOT_YET.to_owned()) => {
                tracing::warn!(reason, "no status API; trying again until it is back");
            }
            Err(reason) => tracing::debug!(reason, "still no status API"),
            Ok(()) if before.is_err() => tracing::info!("the status API can be reached"),
            Ok(()) => {}
        }
        before.clone_from(&reachable);
        let answers = by_lookups.borrow_and_update().clone();
        _ = status.send_replace(reachable.and(answers));
        // Ended early by the lookups' news; without anybody to bring them, there are none.
        let news = async {
            if by_lookups.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        _ = timeout(PROBE_INTERVAL, news).await;
    }
}

#[cfg(test)]
mod properties;
