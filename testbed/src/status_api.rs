//! The status API as it is on good and on bad days.

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

/// What the API answers to one lookup.
#[derive(Clone, Debug)]
pub enum Answer {
    /// 200 with `{"id":…,"online":true}`.
    Online,
    /// 200 with `{"id":…,"online":false}`.
    Offline,
    /// That status, without a body.
    Status(u16),
    /// That status with one header of that name and value.
    StatusWithHeader(u16, &'static str, String),
    /// None, until the client gives up.
    Hang,
    /// 200 with that body, as JSON.
    Body(String),
    /// That status with a body of that content type.
    Page(u16, &'static str, String),
    /// The other answer, after that time.
    After(Duration, Box<Answer>),
    /// The other answer, once the token is cancelled.
    Gated(CancellationToken, Box<Answer>),
    /// 302 to that location.
    Redirect(String),
    /// [`Answer::Online`], its body at a byte a second.
    Trickle,
    /// [`Answer::Online`], behind so many KiB of white space. It is made as it is sent.
    Huge(usize),
    /// The other answer, of which the note is told just before it goes out. A client that has gone
    /// away by then gets none, and the note is not told.
    Observed(SentHook, Box<Answer>),
}

/// What is to be told of an answer that goes out.
#[derive(Clone)]
pub struct SentHook(Arc<dyn Fn() + Send + Sync>);

impl SentHook {
    /// A note that calls `told`.
    pub fn new(told: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(told))
    }
}

impl fmt::Debug for SentHook {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("SentHook")
    }
}

type Behaviour = dyn Fn(i64, u32) -> Answer + Send + Sync;

/// A real HTTP server for `GET /objects/{id}` that behaves as told and remembers who asked.
///
/// It has a thread and a runtime of its own: what the test does cannot hold it up, and when it stops
/// it is gone at once with its connections, like a server that was killed.
#[derive(Debug)]
pub struct StatusApi {
    address: SocketAddr,
    records: Arc<Records>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl StatusApi {
    /// Starts it on a free port. `behaviour` is asked for each lookup, with the id and with how many
    /// times that id has been looked up, this time included.
    pub fn start(behaviour: impl Fn(i64, u32) -> Answer + Send + Sync + 'static) -> Self {
        Self::start_on(local(free_port()), behaviour)
    }

    /// Starts it where another one was, or where one has been missed so far.
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
            // The connections of the one before it may still be on their way out.
            socket.set_reuseaddr(true).expect("a socket takes that option");
            socket
                .bind(address)
                .unwrap_or_else(|error| panic!("cannot listen on {address}: {error}"));
            // With std's short backlog, hundreds of connections at once would wait a second for
            // their SYN to be sent again.
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
                reason = "our own server goes on for a while when a client has closed its sending side, but here such a client has given up"
            )]
            let serving = async { axum::serve(listener, router).await };
            runtime.block_on(stopped.run_until_cancelled(serving));
        });
        Self { address, records, stop, thread: Some(thread) }
    }

    /// Closes its port and all connections. What it has recorded stays readable.
    pub fn stop(&mut self) {
        self.stop.cancel();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("testbed: the status API panicked");
        }
    }

    /// Where it listens, or did.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What to set `TESTER_ENDPOINT` to: `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Each lookup's id and when it came in, the oldest first.
    #[must_use]
    pub fn lookups(&self) -> Vec<(i64, Instant)> {
        self.records.lookups.lock().unwrap_or_else(PoisonError::into_inner).all.clone()
    }

    /// How many lookups of `id` there were.
    #[must_use]
    pub fn lookups_of(&self, id: i64) -> usize {
        let lookups = self.records.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        lookups.counts.get(&id).map_or(0, |count| *count as usize)
    }

    /// What the lookups of `id` said in the header of that name, those that said anything.
    #[must_use]
    pub fn traceparents(&self, id: i64) -> Vec<String> {
        let lookups = self.records.lookups.lock().unwrap_or_else(PoisonError::into_inner);
        lookups.traceparents.get(&id).cloned().unwrap_or_default()
    }

    /// How many lookups wait for their answer now.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.records.in_flight.load(Ordering::SeqCst)
    }

    /// The most lookups that ever waited at the same time.
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
    /// Notes a lookup of `id` and gives how many there were, this one included.
    fn note(&self, id: i64, headers: &HeaderMap) -> u32 {
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

/// Counts a lookup as in flight until it is answered, or its client has gone away and hyper drops
/// what was to answer it.
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
    let mut answer = behaviour(id, records.note(id, &headers));
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
            Answer::Observed(note, answer) => {
                (note.0)();
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
