//! A simulated status API that can answer correctly or fail in many ways.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures_util::stream::{self, StreamExt as _};
use parking_lot::Mutex;
use runtime::CancellationToken;
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
}

impl Answer {
    /// The answer of an API on which, as on the real one, the objects with even ids are online.
    pub fn even_is_online(id: i64) -> Self {
        if id % 2 == 0 { Self::Online } else { Self::Offline }
    }

    /// This answer after `delay`.
    pub fn after(self, delay: Duration) -> Self {
        Self::After(delay, Box::new(self))
    }

    /// This answer after `gate` is cancelled.
    pub fn behind(self, gate: &CancellationToken) -> Self {
        Self::Gated(gate.clone(), Box::new(self))
    }

    /// Whether the answer says online or offline.
    fn is_decision(&self) -> bool {
        match self {
            Self::Online | Self::Offline => true,
            Self::After(_, later) | Self::Gated(_, later) => later.is_decision(),
            _ => false,
        }
    }
}

/// The lookups of one id whose answer is "online" or "offline".
#[derive(Clone, Copy, Debug, Default)]
pub struct Decisions {
    /// The number of lookups. This API answers each, so it gives no reason for a second one.
    pub received: u32,
    /// The number of answers that were sent to a client that still waited.
    pub answered: u32,
    /// The time of the first such answer.
    pub answered_at: Option<SystemTime>,
}

type Behaviour = dyn Fn(i64, u32) -> Answer + Send + Sync;

/// A real HTTP server for `GET /objects/{id}` with configurable answers, which records the lookups.
///
/// It has its own thread and runtime, so that a busy test does not delay it. When it stops, all its
/// connections close at once, like those of a killed server.
pub struct StatusApi {
    address: SocketAddr,
    records: Arc<Records>,
    stop: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

impl StatusApi {
    /// Starts an API on a free port. `behaviour` determines the answer to each lookup from the id
    /// and the number of lookups of that id so far, including this one.
    pub fn start(behaviour: impl Fn(i64, u32) -> Answer + Send + Sync + 'static) -> Self {
        Self::start_on(local(free_port()), behaviour)
    }

    /// Starts an API on which even ids are online. Each answer takes `latency`.
    pub fn even_ids_online(latency: Duration) -> Self {
        Self::start(move |id, _| Answer::even_is_online(id).after(latency))
    }

    /// Starts an API that answers "online" once the returned token is cancelled.
    pub fn gated() -> (Self, CancellationToken) {
        let gate = CancellationToken::new();
        let api_gate = gate.clone();
        (Self::start(move |_, _| Answer::Online.behind(&api_gate)), gate)
    }

    /// Starts an API on `address`.
    pub fn start_on(
        address: SocketAddr,
        behaviour: impl Fn(i64, u32) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let records = Records {
            behaviour: Mutex::new(Arc::new(behaviour)),
            lookups: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            max_in_flight: AtomicUsize::new(0),
        };
        Self::serve(address, Arc::new(records))
    }

    fn serve(address: SocketAddr, records: Arc<Records>) -> Self {
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
        let router = Router::new().route("/objects/{id}", get(look_up));
        let router = router.with_state(Arc::clone(&records));
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

    /// Replaces its behaviour, also for lookups after a restart.
    pub fn set_behaviour(&self, behaviour: impl Fn(i64, u32) -> Answer + Send + Sync + 'static) {
        *self.records.behaviour.lock() = Arc::new(behaviour);
    }

    /// Closes its port and all connections. Its records stay readable.
    pub fn stop(&mut self) {
        self.stop.cancel();
        // Forgets the unanswered lookups, because looking their ids up again is not a repetition.
        for decisions in self.records.lookups.lock().decisions.values_mut() {
            decisions.received = decisions.answered;
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            eprintln!("testkit: the status API panicked");
        }
    }

    /// Listens again on the same address, with the same behaviour and records.
    pub fn restart(&mut self) {
        *self = Self::serve(self.address, Arc::clone(&self.records));
    }

    /// The address on which it listens, or listened before it stopped.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The value for `TESTER_ENDPOINT`: `http://127.0.0.1:PORT`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The id and the arrival time of each lookup, the oldest first.
    pub fn lookups(&self) -> Vec<(i64, Instant)> {
        self.records.lookups.lock().all.clone()
    }

    /// The number of lookups of `id`.
    pub fn lookups_of(&self, id: i64) -> usize {
        self.records.lookups.lock().counts.get(&id).map_or(0, |count| *count as usize)
    }

    /// The ids with more than `times` lookups.
    pub fn looked_up_more_than(&self, times: u32) -> Vec<i64> {
        let lookups = self.records.lookups.lock();
        lookups.counts.iter().filter(|(_, count)| **count > times).map(|(id, _)| *id).collect()
    }

    /// The lookups that say online or offline, by id. A lookup without an answer when the API
    /// stopped does not count.
    pub fn decisions(&self) -> HashMap<i64, Decisions> {
        self.records.lookups.lock().decisions.clone()
    }

    /// The `traceparent` headers of the lookups of `id`, without lookups that had none.
    pub fn traceparents(&self, id: i64) -> Vec<String> {
        self.records.lookups.lock().traceparents.get(&id).cloned().unwrap_or_default()
    }

    /// The number of lookups that wait for their answer now.
    pub fn in_flight(&self) -> usize {
        self.records.in_flight.load(Ordering::SeqCst)
    }

    /// The highest number of lookups that waited at the same time.
    pub fn max_in_flight(&self) -> usize {
        self.records.max_in_flight.load(Ordering::SeqCst)
    }
}

impl Drop for StatusApi {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Records {
    behaviour: Mutex<Arc<Behaviour>>,
    lookups: Mutex<Lookups>,
    in_flight: AtomicUsize,
    max_in_flight: AtomicUsize,
}

#[derive(Default)]
struct Lookups {
    all: Vec<(i64, Instant)>,
    counts: HashMap<i64, u32>,
    decisions: HashMap<i64, Decisions>,
    traceparents: HashMap<i64, Vec<String>>,
}

impl Records {
    /// Records a lookup of `id` and returns its answer.
    fn receive(&self, id: i64, headers: &HeaderMap) -> Answer {
        let number = {
            let mut lookups = self.lookups.lock();
            if let Some(Ok(traceparent)) = headers.get("traceparent").map(HeaderValue::to_str) {
                lookups.traceparents.entry(id).or_default().push(traceparent.to_owned());
            }
            lookups.all.push((id, Instant::now()));
            let count = lookups.counts.entry(id).or_default();
            *count += 1;
            *count
        };
        let behaviour = Arc::clone(&self.behaviour.lock());
        let answer = behaviour(id, number);
        if answer.is_decision() {
            self.lookups.lock().decisions.entry(id).or_default().received += 1;
        }
        answer
    }

    /// Records that a decision about `id` is sent to a client that waits for it.
    fn decided(&self, id: i64) {
        let mut lookups = self.lookups.lock();
        let decisions = lookups.decisions.entry(id).or_default();
        decisions.answered += 1;
        decisions.answered_at.get_or_insert_with(SystemTime::now);
    }
}

/// Counts a lookup as in flight until it is answered, or until its client disconnects and hyper
/// drops the future of [`look_up`].
struct InFlight<'a>(&'a Records);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn look_up(
    Path(id): Path<i64>,
    State(records): State<Arc<Records>>,
    headers: HeaderMap,
) -> Response {
    let now_in_flight = records.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
    records.max_in_flight.fetch_max(now_in_flight, Ordering::SeqCst);
    let _in_flight = InFlight(&records);
    let mut answer = records.receive(id, &headers);
    loop {
        answer = match answer {
            Answer::After(delay, later) => {
                tokio::time::sleep(delay).await;
                *later
            }
            Answer::Gated(gate, answer) => {
                gate.cancelled().await;
                *answer
            }
            answer => {
                if answer.is_decision() {
                    records.decided(id);
                }
                break respond(id, answer).await;
            }
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
        Answer::Hang | Answer::After(..) | Answer::Gated(..) => std::future::pending().await,
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
