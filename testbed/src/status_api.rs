//! A simulated status API that can answer correctly or fail in many ways.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::stream::{self, StreamExt as _};
use service::CancellationToken;
use tokio::net::TcpSocket;

use crate::free_port;
use crate::ports::local;

/// The answer to one lookup.
#[derive(Clone, Debug)]
pub enum Answer {
    /// 200 with `{"id":…,"online":true}`.
    Online,
    /// 200 with `{"id":…,"online":false}`.
    Offline,
    /// This status without a body.
    Status(u16),
    /// This status with one header of this name and value.
    StatusWithHeader(u16, &'static str, String),
    /// No answer until the client gives up.
    Hang,
    /// 200 with this body as JSON.
    Body(String),
    /// This status with a body of this content type.
    Page(u16, &'static str, String),
    /// The inner answer after this time.
    After(Duration, Box<Answer>),
    /// The inner answer after the token is cancelled.
    Gated(CancellationToken, Box<Answer>),
    /// 302 to this location.
    Redirect(String),
    /// [`Answer::Online`] with one byte of the body per second.
    Trickle,
    /// [`Answer::Online`] after this many KiB of white space, which are generated while they are
    /// sent.
    Huge(usize),
    /// The inner answer. The hook runs just before the answer is sent, and does not run if the
    /// client has disconnected.
    Observed(SentHook, Box<Answer>),
}

/// A function that runs just before an answer is sent.
#[derive(Clone)]
pub struct SentHook(Arc<dyn Fn() + Send + Sync>);

impl SentHook {
    /// Creates a hook that calls `function`.
    pub fn new(function: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(function))
    }
}

impl fmt::Debug for SentHook {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("SentHook")
    }
}

type Behaviour = dyn Fn(i64, u32) -> Answer + Send + Sync;

/// A real HTTP server for `GET /objects/{id}` with configurable answers, which records the lookups.
///
/// It has its own thread and runtime, so that a busy test does not delay it. When it stops, all its
/// connections close at once, like those of a killed server.
#[derive(Debug)]
pub struct StatusApi {
    address: SocketAddr,
    records: Arc<Records>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl StatusApi {
    /// Starts it on a free port. `behaviour` determines the answer to each lookup from the id and
    /// the number of lookups of that id so far, including this one.
    pub fn start(behaviour: impl Fn(i64, u32) -> Answer + Send + Sync + 'static) -> Self {
        Self::start_on(local(free_port()), behaviour)
    }

    /// Starts it on `address`, where another one may have been before.
    pub fn start_on(
        address: SocketAddr,
        behaviour: impl Fn(i64, u32) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime should start");
        let listener = {
            let _entered = runtime.enter();
            let socket = TcpSocket::new_v4().expect("a socket should open");
            // Connections of a previous server on this address may still be closing.
            socket.set_reuseaddr(true).expect("a socket has this option");
            socket
                .bind(address)
                .unwrap_or_else(|error| panic!("cannot listen on {address}: {error}"));
            // With std's short backlog, hundreds of simultaneous connections would wait a second
            // for their SYN to be retransmitted.
            socket.listen(4_096).expect("a bound socket can listen")
        };
        let address = listener.local_addr().expect("a listener has an address");
        let records = Arc::new(Records::default());
        let router = router(Arc::clone(&records), Arc::new(behaviour));
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            #[expect(
                clippy::disallowed_methods,
                reason = "our own server keeps serving a client that has closed its sending side, but here such a client has given up"
            )]
            let serving = async { axum::serve(listener, router).await };
            runtime.block_on(stopped.run_until_cancelled(serving));
        });
        Self { address, records, stop, thread: Some(thread) }
    }

    /// Closes its port and all connections. Its records stay readable.
    pub fn stop(&mut self) {
        self.stop.cancel();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("testbed: the status API panicked");
        }
    }

    /// The address on which it listens, or listened before it stopped.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The value for `TESTER_ENDPOINT`: `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The id and the arrival time of each lookup, the oldest first.
    #[must_use]
    pub fn lookups(&self) -> Vec<(i64, Instant)> {
        self.records.lookups.lock().unwrap_or_else(PoisonError::into_inner).all.clone()
    }

    /// The number of lookups of `id`.
    #[must_use]
    pub fn lookups_of(&self, id: i64) -> usize {
        let lookups = self.records.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        lookups.counts.get(&id).map_or(0, |count| *count as usize)
    }

    /// The `traceparent` headers of the lookups of `id`, without lookups that had none.
    #[must_use]
    pub fn traceparents(&self, id: i64) -> Vec<String> {
        let lookups = self.records.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        lookups.traceparents.get(&id).cloned().unwrap_or_default()
    }

    /// The number of lookups that wait for their answer now.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.records.in_flight.load(Ordering::SeqCst)
    }

    /// The highest number of lookups that waited at the same time.
    #[must_use]
    pub fn max_in_flight(&self) -> usize {
        self.records.max_in_flight.load(Ordering::SeqCst)
    }
}

impl Drop for StatusApi {
    fn drop(&mut self) {
        self.stop();
    }
}

#[derive(Debug, Default)]
struct Records {
    lookups: Mutex<Lookups>,
    in_flight: AtomicUsize,
    max_in_flight: AtomicUsize,
}

#[derive(Debug, Default)]
struct Lookups {
    all: Vec<(i64, Instant)>,
    counts: HashMap<i64, u32>,
    traceparents: HashMap<i64, Vec<String>>,
}

impl Records {
    /// Records a lookup of `id` and returns the number of its lookups, including this one.
    fn record(&self, id: i64, headers: &HeaderMap) -> u32 {
        let mut lookups = self.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Ok(traceparent)) = headers.get("traceparent").map(HeaderValue::to_str) {
            lookups.traceparents.entry(id).or_default().push(traceparent.to_owned());
        }
        lookups.all.push((id, Instant::now()));
        let count = lookups.counts.entry(id).or_default();
        *count += 1;
        *count
    }
}

/// Counts a lookup as in flight until it is answered, or its client disconnects and hyper drops the
/// handler.
struct InFlight<'a>(&'a Records);

impl<'a> InFlight<'a> {
    fn enter(records: &'a Records) -> Self {
        let now = records.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        records.max_in_flight.fetch_max(now, Ordering::SeqCst);
        Self(records)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

fn router(records: Arc<Records>, behaviour: Arc<Behaviour>) -> Router {
    Router::new().route("/objects/{id}", get(look_up)).with_state((records, behaviour))
}

async fn look_up(
    Path(id): Path<i64>,
    State((records, behaviour)): State<(Arc<Records>, Arc<Behaviour>)>,
    headers: HeaderMap,
) -> Response {
    let _in_flight = InFlight::enter(&records);
    let mut answer = behaviour(id, records.record(id, &headers));
    loop {
        answer = match answer {
            Answer::After(delay, later) => {
                tokio::time::sleep(delay).await;
                *later
            }
            Answer::Gated(token, answer) => {
                token.cancelled().await;
                *answer
            }
            Answer::Observed(hook, answer) => {
                (hook.0)();
                *answer
            }
            answer => break respond(id, answer).await,
        };
    }
}

async fn respond(id: i64, answer: Answer) -> Response {
    let json = [(header::CONTENT_TYPE, "application/json")];
    match answer {
        Answer::Online => (json, online(id)).into_response(),
        Answer::Offline => (json, format!(r#"{{"id":{id},"online":false}}"#)).into_response(),
        Answer::Status(code) => status(code).into_response(),
        Answer::StatusWithHeader(code, name, value) => {
            (status(code), [(HeaderName::from_static(name), value)]).into_response()
        }
        Answer::Body(body) => (json, body).into_response(),
        Answer::Page(code, content_type, body) => {
            (status(code), [(header::CONTENT_TYPE, content_type)], body).into_response()
        }
        Answer::Redirect(location) => {
            (StatusCode::FOUND, [(header::LOCATION, location)]).into_response()
        }
        Answer::Trickle => (json, trickling(online(id))).into_response(),
        Answer::Huge(kib) => (json, behind_white_space(kib, online(id))).into_response(),
        Answer::Hang | Answer::After(..) | Answer::Gated(..) | Answer::Observed(..) => {
            std::future::pending().await
        }
    }
}

fn online(id: i64) -> String {
    format!(r#"{{"id":{id},"online":true}}"#)
}

fn trickling(text: String) -> Body {
    let next = async |mut bytes: std::vec::IntoIter<u8>| {
        let byte = bytes.next()?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        Some((Ok::<_, Infallible>(vec![byte]), bytes))
    };
    Body::from_stream(stream::unfold(text.into_bytes().into_iter(), next))
}

fn behind_white_space(kib: usize, text: String) -> Body {
    static KIB: [u8; 1_024] = [b' '; 1_024];
    let spaces = stream::iter(std::iter::repeat_n(Bytes::from_static(&KIB), kib));
    let all = spaces.chain(stream::iter([Bytes::from(text)]));
    Body::from_stream(all.map(Ok::<_, Infallible>))
}

fn status(code: u16) -> StatusCode {
    StatusCode::from_u16(code).expect("a test's status code should have three digits")
}
