//! The HTTP side: from a request to its answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use broker::PublishError;
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
use crate::places::{Places, Unavailable};
use crate::repeats::Turn;
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
    let label = match &outcome {
        Ok(_) => "accepted",
        Err(problem) => match problem.status {
            StatusCode::SERVICE_UNAVAILABLE => "unavailable",
            StatusCode::REQUEST_TIMEOUT => "timeout",
            StatusCode::UNAUTHORIZED => "unauthorized",
            _ => "bad",
        },
    };
    metrics::counter!("lastseen_callbacks_total", "outcome" => label).increment(1);
    metrics::histogram!("lastseen_callback_seconds", "outcome" => label).record(started.elapsed());
    let mut response = match outcome {
        Ok(accepted) => Json(accepted).into_response(),
        Err(problem) => {
            let (status, reason) = (problem.status.as_u16(), problem.detail.as_str());
            tracing::debug!(callback_id, status, reason, "callback not accepted");
            problem.into_response()
        }
    };
    span.set("http.response.status_code", i64::from(response.status().as_u16()));
    if response.status().is_server_error() {
        span.fail("not durable");
    }
    if let Ok(value) = HeaderValue::try_from(callback_id) {
        response.headers_mut().insert(CALLBACK_ID, value);
    }
    response
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
        let fingerprint = unverified.verify(&body.bytes)?;
        let Callback { listed, ids } =
            Callback::parse(&body.bytes, self.config.max_ids_per_callback)?;
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
    // An outage is logged once by the publisher, and under overload a line for each would be more load.
    if !matches!(error.broker, PublishError::Away(_) | PublishError::Full(_)) {
        tracing::warn!(%error, "callback refused");
    }
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

async fn method_not_allowed(method: Method) -> Problem {
    let detail = format!("{method} is not known here: POST to /callback");
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail)
}

async fn not_found(uri: Uri) -> Problem {
    let detail = format!("there is nothing at {}: POST to /callback", uri.path());
    Problem::new(StatusCode::NOT_FOUND, detail)
}

fn describe_metrics() {
    metrics::describe_counter!("lastseen_callbacks_total", "Callbacks by outcome.");
    for outcome in ["accepted", "bad", "unauthorized", "timeout", "unavailable"] {
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
