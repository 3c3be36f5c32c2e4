//! The HTTP server: handles callbacks from the request to the response.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use messaging::queue::Broker;
use runtime::authenticity::Authenticity;
use runtime::problem::Problem;
use runtime::traces::{KeyValue, Span, SpanKind, Step, TRACEPARENT};
use runtime::{Context, health_routes, http};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::time::Instant;
use uuid::Uuid;

use crate::body::BodyReader;
use crate::callback::Callback;
use crate::config::Callbacks;
use crate::deadline::Deadline;
use crate::duplicate_filter::Admission;
use crate::durable_sink::{DurableSink, NotStored};
use crate::rejections::{Rejection, Rejections};
use crate::signature::Signatures;

/// After the stop signal, the server keeps connections open until no request has arrived for this
/// time. A client that sends callbacks continuously sends the next one within it. The response to
/// that callback closes the connection, and the client connects to another producer.
const FAREWELL: Duration = Duration::from_secs(2);
/// The response header with the id that identifies the callback in logs and in its messages.
const CALLBACK_ID: HeaderName = HeaderName::from_static("callback-id");
/// The header in which a browser reports whether a page of another site caused the request.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The producer's HTTP server, which listens but does not serve yet.
pub struct CallbackServer {
    listener: TcpListener,
    limits: http::Limits,
    shared: Arc<Shared>,
    context: Context,
}

struct Shared {
    sink: DurableSink,
    bodies: BodyReader,
    signatures: Signatures,
    rejections: Arc<Rejections>,
    config: Callbacks,
}

impl CallbackServer {
    /// Opens the spool, starts to connect to the broker, and listens on `PRODUCER_ADDR`.
    ///
    /// # Errors
    /// When the server cannot listen on the address. A spool that cannot be opened is no error,
    /// because callbacks do not need the spool while the broker accepts messages.
    pub async fn open(
        callbacks: Callbacks,
        authenticity: Authenticity,
        broker: Broker,
        context: Context,
    ) -> anyhow::Result<Self> {
        describe_metrics();
        let address = callbacks.producer_addr;
        let sink = DurableSink::open(&callbacks, broker).await;
        // Listen only after the spool is open: a client that connects earlier would have to wait
        // for the spool.
        let listener = http::listen(address)
            .with_context(|| format!("cannot listen on PRODUCER_ADDR={address}"))?;
        sink.report_to(&context.health);
        context.health.finish_registration();
        let limits = http::Limits {
            max_connections: callbacks.max_connections,
            header_timeout: callbacks.header_timeout,
            idle_timeout: Some(callbacks.idle_timeout),
            quiet_period: FAREWELL,
        };
        let shared = Arc::new(Shared {
            sink,
            bodies: BodyReader::new(&callbacks),
            signatures: Signatures::new(authenticity.callback_secret),
            rejections: Arc::default(),
            config: callbacks,
        });
        Ok(Self { listener, limits, shared, context })
    }

    /// The address that the server listens on, with the actual port if the setting has port 0.
    ///
    /// # Errors
    /// When the operating system does not report the address.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers callbacks until the shutdown, then finishes those in flight.
    ///
    /// # Errors
    /// When the operating system does not report the address.
    pub async fn serve(self) -> anyhow::Result<()> {
        tracing::info!(address = %self.address()?, "accepting callbacks on POST /callback");
        let Context { health, shutdown, supervisor } = self.context;
        let shared = Arc::clone(&self.shared);
        let relay = shared.sink.spawn_relay(&supervisor);
        let router = Router::new()
            .route("/callback", post(respond))
            .merge(health_routes(health))
            .method_not_allowed_fallback(method_not_allowed)
            .fallback(not_found)
            .with_state(self.shared);
        http::serve(self.listener, router, self.limits, shutdown).await;
        // No earlier, because a callback in flight may still go to the spool.
        if shared.config.drain_spool {
            shared.sink.drain_spool().await;
        }
        if let Some(relay) = relay {
            relay.stop().await;
        }
        if let Some(shared) = Arc::into_inner(shared) {
            shared.sink.close().await;
        }
        Ok(())
    }
}

/// The response to a callback whose messages are all durable.
#[derive(Serialize)]
struct Accepted {
    /// The number of ids that the callback lists, repeats included.
    accepted: usize,
    /// The number of distinct ids, each of which has a message.
    queued: usize,
}

async fn respond(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let started = Instant::now();
    let callback_id = Uuid::now_v7().to_string();
    let (peer, headers, body) = split(request);
    let remote_parent = || headers.get(TRACEPARENT)?.to_str().ok();
    let mut span = Span::begin(remote_parent, callback_step);
    let deadline = shared.sink.deadline(started);
    let outcome = shared.accept(&span, &callback_id, headers, body, deadline).await;
    let response = match outcome {
        Ok(accepted) => {
            count("accepted");
            with_callback_id(&callback_id, Json(accepted).into_response())
        }
        Err(problem) => shared.reject(callback_id, peer, problem),
    };
    let label = outcome_label(response.status());
    metrics::histogram!("lastseen_callback_seconds", "outcome" => label).record(started.elapsed());
    span.set("http.response.status_code", i64::from(response.status().as_u16()));
    if response.status().is_server_error() {
        span.fail("not durable");
    }
    response
}

/// The client's address, the headers and the body. The rest of the head is dropped: until no part of
/// it is left, hyper cannot reuse the memory that it has read the head into, and takes another 8 KiB
/// for the connection.
fn split(request: Request) -> (Option<SocketAddr>, HeaderMap, Body) {
    let peer = request.extensions().get::<ConnectInfo<SocketAddr>>().map(|peer| peer.0);
    let (head, body) = request.into_parts();
    (peer, head.headers, body)
}

async fn method_not_allowed(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let detail = "method not allowed: POST callbacks to /callback";
    shared.reject_unread(request, Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail))
}

async fn not_found(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let detail =
        format!("there is nothing at {}: POST callbacks to /callback", request.uri().path());
    shared.reject_unread(request, Problem::new(StatusCode::NOT_FOUND, detail))
}

fn with_callback_id(callback_id: &str, mut response: Response) -> Response {
    if let Ok(value) = HeaderValue::try_from(callback_id) {
        response.headers_mut().insert(CALLBACK_ID, value);
    }
    response
}

fn count(outcome: &'static str) {
    metrics::counter!("lastseen_callbacks_total", "outcome" => outcome).increment(1);
}

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

fn callback_step() -> Step {
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
    /// Counts and logs a rejected request, and makes its response. Every rejection is logged,
    /// because the ids of a rejected callback are lost: partners do not send a callback twice.
    fn reject(&self, callback_id: String, peer: Option<SocketAddr>, problem: Problem) -> Response {
        count(outcome_label(problem.status));
        let (status, reason) = (problem.status.as_u16(), problem.detail.clone());
        let response = with_callback_id(&callback_id, problem.into_response());
        self.rejections.log(Rejection { callback_id, status, reason, peer });
        response
    }

    fn reject_unread(&self, request: Request, problem: Problem) -> Response {
        self.reject(Uuid::now_v7().to_string(), split(request).0, problem)
    }

    /// Makes a message for each distinct id of the body, and returns once all of them are durable.
    async fn accept(
        &self,
        span: &Span,
        callback_id: &str,
        headers: HeaderMap,
        body: Body,
        deadline: Deadline,
    ) -> Result<Accepted, Problem> {
        reject_cross_site(&headers)?;
        let signature = self.signatures.read_headers(&headers)?;
        let body = self.bodies.read(&headers, body, deadline).await?;
        let deadline = deadline.after_body();
        let fingerprint = signature.verify(body.bytes())?;
        let Callback { listed, ids } =
            Callback::parse(body.bytes(), self.config.max_ids_per_callback)?;
        // See `split`.
        drop((headers, body));
        let accepted = Accepted { accepted: listed, queued: ids.len() };
        let in_flight = match fingerprint {
            None => None,
            Some(fingerprint) => match self.signatures.admit(fingerprint, deadline).await? {
                Admission::Publish(guard) => Some(guard),
                Admission::AlreadyPublished => return Ok(accepted),
            },
        };
        let stored = self.sink.store(span, callback_id, &ids, deadline).await;
        stored.map_err(|error| unavailable(&error))?;
        if let Some(guard) = in_flight {
            guard.mark_published();
        }
        tracing::debug!(callback_id, accepted = listed, queued = ids.len(), "callback accepted");
        metrics::counter!("lastseen_callback_ids_total").increment(listed as u64);
        Ok(accepted)
    }
}

/// Rejects a request that a browser sends for a web page of another site. Otherwise any page could
/// forge callbacks through the browser of a visitor that can reach this address. Partners' servers
/// do not send this header.
fn reject_cross_site(headers: &HeaderMap) -> Result<(), Problem> {
    if headers.get_all(SEC_FETCH_SITE).iter().any(|site| site == "cross-site") {
        let detail =
            "callbacks from web pages of other sites are not allowed (Sec-Fetch-Site: cross-site)";
        return Err(Problem::new(StatusCode::FORBIDDEN, detail));
    }
    Ok(())
}

fn unavailable(error: &NotStored) -> Problem {
    Problem {
        status: StatusCode::SERVICE_UNAVAILABLE,
        detail: format!("{error}: send the callback again"),
        retry_after_seconds: Some(1),
    }
}

fn describe_metrics() {
    metrics::describe_counter!("lastseen_callbacks_total", "Requests by outcome.");
    let outcomes = ["accepted", "bad", "unauthorized", "timeout", "unavailable", "not_found"];
    for outcome in outcomes.into_iter().chain(["method_not_allowed"]) {
        metrics::counter!("lastseen_callbacks_total", "outcome" => outcome).increment(0);
    }
    metrics::describe_counter!(
        "lastseen_callback_repeats_total",
        "Repeats of signed callbacks that were already published."
    );
    metrics::describe_counter!("lastseen_callback_ids_total", "Ids listed in accepted callbacks.");
    metrics::counter!("lastseen_callback_repeats_total").increment(0);
    metrics::counter!("lastseen_callback_ids_total").increment(0);
    metrics::describe_histogram!(
        "lastseen_callback_seconds",
        metrics::Unit::Seconds,
        "Time from the head of a callback to its response."
    );
}
