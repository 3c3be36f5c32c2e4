//! The HTTP side: from a request to its answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use serde::Serialize;
use service::problem::Problem;
use service::traces::{KeyValue, Span, SpanKind, Step, TRACEPARENT};
use service::{CancellationToken, Health, http, probes};
use tokio::net::TcpListener;
use tokio::time::Instant;
use uuid::Uuid;

use crate::body::Bodies;
use crate::callback::Callback;
use crate::config::{Callbacks, Config};
use crate::deadline::Deadline;
use crate::duplicate_filter::Turn;
use crate::durable_sink::{Places, Unavailable};
use crate::rejections::{Rejection, Rejections};
use crate::signature::Signatures;

/// Who sends callbacks all the time brings the next one within this time, and then moves on.
const FAREWELL: Duration = Duration::from_secs(2);
/// Names the callback in our logs and in the messages that it becomes.
const CALLBACK_ID: HeaderName = HeaderName::from_static("callback-id");
/// By which a browser says where the page is from that has it send a request.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The producer, listening and not yet serving.
pub struct FrontDoor {
    listener: TcpListener,
    limits: http::Limits,
    shared: Arc<Shared>,
    health: Health,
}

/// What the requests share.
struct Shared {
    places: Places,
    bodies: Bodies,
    signatures: Signatures,
    rejections: Arc<Rejections>,
    config: Callbacks,
}

impl FrontDoor {
    /// Opens the spool, starts to look for the broker, and listens on `PRODUCER_ADDR`.
    ///
    /// # Errors
    /// When the address cannot be listened on, or the queue's file not be opened. A spool that cannot be
    /// opened is none: while the broker is there, callbacks can do without.
    pub async fn open(config: &Config, health: &Health) -> anyhow::Result<Self> {
        describe_metrics();
        let callbacks = &config.callbacks;
        let address = callbacks.producer_addr;
        let places = Places::open(config).await?;
        // Last: a client that can connect waits for an answer, and the spool takes a while to open.
        let listener = http::listen(address)
            .with_context(|| format!("cannot listen on PRODUCER_ADDR={address}"))?;
        places.tell(health);
        health.all_told();
        let limits = http::Limits {
            max_connections: callbacks.max_connections,
            header_timeout: callbacks.header_timeout,
            idle_timeout: Some(callbacks.idle_timeout),
            farewell: FAREWELL,
        };
        let shared = Arc::new(Shared {
            places,
            bodies: Bodies::new(callbacks),
            signatures: Signatures::new(config.authenticity.callback_secret.clone()),
            rejections: Arc::default(),
            config: callbacks.clone(),
        });
        Ok(Self { listener, limits, shared, health: health.clone() })
    }

    /// The address that it listens on, with the port that was free if any was asked for.
    ///
    /// # Errors
    /// When the operating system does not say.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers callbacks until `shutdown`, then finishes those in flight.
    ///
    /// # Errors
    /// When the publisher or the spool has died: not everything could be accepted any more.
    pub async fn serve(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        tracing::info!(address = %self.address()?, "taking callbacks on POST /callback");
        let shared = Arc::clone(&self.shared);
        let router = Router::new()
            .route("/callback", post(take))
            .merge(probes(self.health))
            .method_not_allowed_fallback(method_not_allowed)
            .fallback(not_found)
            .layer(middleware::from_fn(last_if_chunked))
            .with_state(self.shared);
        tokio::select! {
            () = http::serve(self.listener, router, self.limits, shutdown) => {}
            served = shared.places.serve() => served?,
        }
        if let Some(shared) = Arc::into_inner(shared) {
            shared.places.close().await;
        }
        Ok(())
    }
}

/// The answer to a callback that is safe.
#[derive(Serialize)]
struct Accepted {
    /// How many ids it listed.
    accepted: usize,
    /// How many of them are distinct, each now a message.
    queued: usize,
}

async fn take(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let started = Instant::now();
    let callback_id = Uuid::now_v7().to_string();
    let (head, body) = request.into_parts();
    let partners_span = || head.headers.get(TRACEPARENT)?.to_str().ok();
    let mut span = Span::begin(partners_span, step);
    let deadline = shared.places.deadline(started);
    let outcome = shared.accept(&span, &callback_id, &head.headers, body, deadline).await;
    let response = match outcome {
        Ok(accepted) => {
            count("accepted");
            with_id(&callback_id, Json(accepted).into_response())
        }
        Err(problem) => shared.reject(callback_id, &head, problem),
    };
    let label = outcome_label(response.status());
    metrics::histogram!("lastseen_callback_seconds", "outcome" => label).record(started.elapsed());
    span.set("http.response.status_code", i64::from(response.status().as_u16()));
    if response.status().is_server_error() {
        span.fail("not durable");
    }
    response
}

async fn method_not_allowed(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let detail = "method not allowed: POST callbacks to /callback";
    shared.reject_unread(request, Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail))
}

async fn not_found(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let detail = format!("there is nothing at {}: POST to /callback", request.uri().path());
    shared.reject_unread(request, Problem::new(StatusCode::NOT_FOUND, detail))
}

fn with_id(callback_id: &str, mut response: Response) -> Response {
    if let Ok(value) = HeaderValue::try_from(callback_id) {
        response.headers_mut().insert(CALLBACK_ID, value);
    }
    response
}

fn count(outcome: &'static str) {
    metrics::counter!("lastseen_callbacks_total", "outcome" => outcome).increment(1);
}

/// The label in metrics of a request that is answered with this status.
fn outcome_label(status: StatusCode) -> &'static str {
    match status {
        StatusCode::OK => "accepted",
        StatusCode::SERVICE_UNAVAILABLE => "unavailable",
        StatusCode::REQUEST_TIMEOUT => "timeout",
        StatusCode::UNAUTHORIZED => "unauthorized",
        StatusCode::NOT_FOUND => "not_found",
        StatusCode::METHOD_NOT_ALLOWED => "method_not_allowed",
        _ => "bad",
    }
}

/// A callback, as traces have it.
fn step() -> Step {
    Step {
        name: "POST /callback".into(),
        kind: SpanKind::Server,
        attributes: vec![
            KeyValue::new("http.request.method", "POST"),
            KeyValue::new("http.route", "/callback"),
            KeyValue::new("url.path", "/callback"),
            KeyValue::new("url.scheme", "http"),
        ],
    }
}

impl Shared {
    /// Counts a rejected request, logs it, and answers it. Every rejection goes through here: its sender does not repeat the callback.
    fn reject(&self, callback_id: String, head: &Parts, problem: Problem) -> Response {
        count(outcome_label(problem.status));
        let peer = head.extensions.get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0);
        let (status, reason) = (problem.status.as_u16(), problem.detail.clone());
        let response = with_id(&callback_id, problem.into_response());
        self.rejections.note(Rejection { callback_id, status, reason, peer });
        response
    }

    fn reject_unread(&self, request: Request, problem: Problem) -> Response {
        self.reject(Uuid::now_v7().to_string(), &request.into_parts().0, problem)
    }

    /// Makes every distinct id of the body a message, and returns once all of them are durable.
    async fn accept(
        &self,
        span: &Span,
        callback_id: &str,
        headers: &HeaderMap,
        body: Body,
        deadline: Deadline,
    ) -> Result<Accepted, Problem> {
        refuse_cross_site(headers)?;
        let unverified = self.signatures.claimed(headers)?;
        let body = self.bodies.read(headers, body, deadline).await?;
        let deadline = deadline.after_body();
        let fingerprint = unverified.verify(body.bytes())?;
        let Callback { listed, ids } =
            Callback::parse(body.bytes(), self.config.max_ids_per_callback)?;
        drop(body);
        let accepted = Accepted { accepted: listed, queued: ids.len() };
        let turn = match fingerprint {
            None => None,
            Some(fingerprint) => match self.signatures.turn(fingerprint, deadline).await? {
                Turn::Ours(turn) => Some(turn),
                Turn::Published => return Ok(accepted),
            },
        };
        let taken = self.places.take(span, callback_id, &ids, deadline).await;
        taken.map_err(|error| unavailable(&error))?;
        if let Some(turn) = turn {
            turn.published();
        }
        tracing::debug!(callback_id, accepted = listed, queued = ids.len(), "callback accepted");
        metrics::counter!("lastseen_callback_ids_total").increment(listed as u64);
        Ok(accepted)
    }
}

/// Refuses what a web page of another site has a browser send: it could make up callbacks in the name of
/// anybody who can reach this address. Partners send from servers, and those send no such header.
fn refuse_cross_site(headers: &HeaderMap) -> Result<(), Problem> {
    if headers.get_all(SEC_FETCH_SITE).iter().any(|site| site == "cross-site") {
        let detail =
            "a web page of another site must not send callbacks (Sec-Fetch-Site: cross-site)";
        return Err(Problem::new(StatusCode::FORBIDDEN, detail));
    }
    Ok(())
}

fn unavailable(error: &Unavailable) -> Problem {
    Problem {
        status: StatusCode::SERVICE_UNAVAILABLE,
        detail: format!("{error}: send the callback again"),
        retry_after_seconds: Some(1),
    }
}

/// Closes the connection behind a request that is chunked. It may have had a `Content-Length` too,
/// by which somebody in front of us found another end of it; what follows is then a part of a body,
/// and must not be read as a request (RFC 9112, 6.1).
async fn last_if_chunked(request: Request, next: Next) -> Response {
    let chunked = request.headers().contains_key(header::TRANSFER_ENCODING);
    let mut response = next.run(request).await;
    if chunked {
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn describe_metrics() {
    metrics::describe_counter!("lastseen_callbacks_total", "Requests by outcome.");
    let outcomes = ["accepted", "bad", "unauthorized", "timeout", "unavailable", "not_found"];
    for outcome in outcomes.into_iter().chain(["method_not_allowed"]) {
        metrics::counter!("lastseen_callbacks_total", "outcome" => outcome).increment(0);
    }
    metrics::describe_counter!(
        "lastseen_callback_repeats_total",
        "Signed callbacks that came again and were published before."
    );
    metrics::describe_counter!("lastseen_callback_ids_total", "Ids listed in accepted callbacks.");
    metrics::counter!("lastseen_callback_repeats_total").increment(0);
    metrics::counter!("lastseen_callback_ids_total").increment(0);
    metrics::describe_histogram!(
        "lastseen_callback_seconds",
        metrics::Unit::Seconds,
        "Time from the head of a callback to its answer."
    );
}
