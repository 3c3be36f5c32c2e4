//! The HTTP server's limits, tested with clients that write to a socket.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::StatusCode;
use axum::routing::{get, post};
use futures_util::stream;
use runtime::CancellationToken;
use runtime::http::{Limits, listen, serve};
use testkit::Wire;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use crate::DEADLINE;

const GET: &str = "GET / HTTP/1.1\r\nHost: x\r\n\r\n";

/// A server that ends with the test.
struct Server {
    address: SocketAddr,
    shutdown: CancellationToken,
    serving: JoinHandle<()>,
}

impl Server {
    fn start(router: Router, limits: Limits) -> Self {
        let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(serve(listener, router, limits, shutdown.clone()));
        Self { address, shutdown, serving }
    }

    async fn connect(&self) -> Wire {
        Wire::connect(self.address).await
    }

    async fn stop(self) {
        self.shutdown.cancel();
        timeout(DEADLINE, self.serving).await.unwrap().unwrap();
    }
}

async fn get_ok(client: &mut Wire) {
    client.send(GET).await;
    assert_eq!(client.reply().await.status, 200);
}

/// Waits until the server closes the connection, and returns how long that took. The server must
/// send nothing.
async fn closed_after(mut client: Wire) -> Duration {
    let start = Instant::now();
    assert_eq!(client.closed().await, b"");
    start.elapsed()
}

fn short_header_timeout(idle_timeout: Option<Duration>) -> Limits {
    Limits { header_timeout: Duration::from_millis(300), idle_timeout, ..Limits::default() }
}

fn hello() -> Router {
    Router::new().route("/", get(async || "hello"))
}

// Field case 1.6
#[tokio::test]
async fn idle_connection_outlives_the_header_timeout() {
    let limits = short_header_timeout(Some(DEADLINE));
    let server = Server::start(hello(), limits);
    let mut clients = Vec::new();
    for _ in 0..20 {
        clients.push(server.connect().await);
    }
    for client in &mut clients[10..] {
        get_ok(client).await;
    }
    // Twice the time limit of a head. Only half of the connections have had a request before.
    sleep(2 * limits.header_timeout).await;
    for client in &mut clients {
        get_ok(client).await;
    }
}

// Field case 1.6
#[tokio::test]
async fn trickling_head_has_a_deadline() {
    let limits = short_header_timeout(Some(DEADLINE));
    let server = Server::start(hello(), limits);
    for is_first_request in [true, false] {
        let mut client = server.connect().await;
        if !is_first_request {
            get_ok(&mut client).await;
        }
        let (mut reader, mut writer) = client.0.into_split();
        let trickling = tokio::spawn(async move {
            while writer.write_all(b"G").await.is_ok() {
                sleep(Duration::from_millis(20)).await;
            }
        });
        let read = timeout(DEADLINE / 2, reader.read_u8()).await.unwrap();
        assert!(read.is_err(), "{read:?}");
        trickling.abort();
    }
}

// Field case 1.6
#[tokio::test]
async fn an_idle_connection_is_closed_after_the_idle_timeout() {
    let idle_timeout = Duration::from_millis(300);
    let limits = Limits { idle_timeout: Some(idle_timeout), ..Limits::default() };
    let server = Server::start(hello(), limits);
    let unused = server.connect().await;
    closed_after(unused).await;
    let mut used = server.connect().await;
    get_ok(&mut used).await;
    let after = closed_after(used).await;
    // The idle time starts before the client reads the response, so `after` may be shorter.
    assert!(after >= idle_timeout / 2, "{after:?}");
}

// Field case 2.4
#[tokio::test]
async fn connection_without_keep_alive_serves_one_request() {
    let limits = short_header_timeout(None);
    let server = Server::start(hello(), limits);
    let mut client = server.connect().await;
    client.send(GET).await;
    let response = client.reply().await;
    assert!(response.head.contains("connection: close\r\n"), "{response:?}");
    closed_after(client).await;
    closed_after(server.connect().await).await;
}

/// A server that responds without reading the body.
fn refusing() -> Router {
    let refuse = async || (StatusCode::PAYLOAD_TOO_LARGE, "too large");
    Router::new().route("/", post(refuse))
}

// Field case 1.5
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_writes_all_before_it_reads_gets_the_response() {
    const BODY_BYTES: usize = 20 << 20;
    let server = Server::start(refusing(), Limits::default());
    let length = format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {BODY_BYTES}\r\n\r\n");
    // The size of the chunk is BODY_BYTES in hexadecimal.
    let chunked = "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1400000\r\n";
    let mut clients = JoinSet::new();
    for number in 0..10 {
        let mut client = server.connect().await;
        let head = if number % 2 == 0 { length.clone() } else { chunked.to_owned() };
        clients.spawn(async move {
            client.send(head).await;
            client.send(vec![b'a'; BODY_BYTES]).await;
            // If the server had closed the connection with unread bytes, the connection would be
            // reset by now, and the response would be lost.
            sleep(Duration::from_millis(100)).await;
            let response = client.reply().await;
            assert_eq!((response.status, response.body.as_str()), (413, "too large"));
            assert!(response.head.contains("connection: close\r\n"), "{response:?}");
            closed_after(client).await;
        });
    }
    clients.join_all().await;
}

// Field case 1.5
#[tokio::test]
async fn a_client_whose_body_stalls_gets_the_response() {
    let server = Server::start(refusing(), Limits::default());
    for header in ["Content-Length: 1000", "Transfer-Encoding: chunked"] {
        let mut client = server.connect().await;
        client.send(format!("POST / HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n1")).await;
        let response = client.reply().await;
        assert_eq!(response.status, 413);
        assert!(response.head.contains("connection: close\r\n"), "{response:?}");
    }
}

// Field case 1.5
#[tokio::test]
async fn rejected_client_gets_no_100_continue() {
    let server = Server::start(refusing(), Limits::default());
    let mut client = server.connect().await;
    client
        .send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n")
        .await;
    let response = client.reply().await;
    assert_eq!(response.status, 413);
    assert!(response.head.contains("connection: close\r\n"), "{response:?}");
}

#[tokio::test]
async fn small_unread_body_does_not_end_the_connection() {
    let server = Server::start(refusing(), Limits::default());
    let mut client = server.connect().await;
    for _ in 0..3 {
        client.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n").await;
        client.send([b'a'; 1000]).await;
        let response = client.reply().await;
        assert_eq!(response.status, 413);
        assert!(!response.head.contains("connection: close"), "{response:?}");
    }
}

// Field case 1.10
#[tokio::test]
async fn half_closed_client_gets_the_response() {
    let slow = async |body: Bytes| {
        sleep(Duration::from_millis(300)).await;
        body
    };
    let server = Server::start(Router::new().route("/", post(slow)), Limits::default());
    let mut client = server.connect().await;
    client.send("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello").await;
    client.0.shutdown().await.unwrap();
    assert_eq!(client.reply().await.body, "hello");
    closed_after(client).await;
}

/// Sets its flag when it is dropped.
struct Dropped(Arc<AtomicBool>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

// Field case 1.10
#[tokio::test]
async fn request_of_a_lost_client_ends() {
    let is_dropped = Arc::new(AtomicBool::new(false));
    let hang = {
        let is_dropped = Arc::clone(&is_dropped);
        async move || {
            let _dropped = Dropped(is_dropped);
            std::future::pending::<()>().await;
        }
    };
    let server = Server::start(Router::new().route("/", get(hang)), Limits::default());
    let mut client = server.connect().await;
    client.send(GET).await;
    drop(client);
    let dropped = async {
        while !is_dropped.load(Ordering::Relaxed) {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(DEADLINE, dropped).await.unwrap();
}

/// A server that sends an endless body, and a flag that is set when it drops the body.
fn endless() -> (Router, Arc<AtomicBool>) {
    let is_dropped = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&is_dropped);
    let respond = async move || {
        Body::from_stream(stream::unfold(Dropped(flag), async |dropped| {
            Some((Ok::<_, Infallible>(Bytes::from_static(&[b'a'; 4096])), dropped))
        }))
    };
    (Router::new().route("/", get(respond)), is_dropped)
}

/// A client with a small receive buffer.
async fn with_small_buffer(server: &Server) -> Wire {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4_096).unwrap();
    let mut client = Wire(socket.connect(server.address).await.unwrap());
    client.send(GET).await;
    client
}

// Field case 2.1
#[tokio::test]
async fn client_that_reads_single_bytes_is_disconnected() {
    let limits = Limits { header_timeout: Duration::from_secs(1), ..Limits::default() };
    let (router, is_dropped) = endless();
    let server = Server::start(router, limits);
    let mut client = with_small_buffer(&server).await;
    let trickle = async {
        while !is_dropped.load(Ordering::Relaxed) {
            client.0.read_u8().await.unwrap();
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(DEADLINE, trickle).await.unwrap();
}

// Field case 2.1
#[tokio::test]
async fn client_that_reads_slowly_but_steadily_is_served() {
    let limits = Limits { header_timeout: Duration::from_secs(1), ..Limits::default() };
    let server = Server::start(endless().0, limits);
    let mut client = with_small_buffer(&server).await;
    let mut chunk = vec![0; 32 << 10];
    // This takes at least 3 s. A client that reads nothing is disconnected after 1 s.
    for _ in 0..60 {
        timeout(DEADLINE, client.0.read_exact(&mut chunk)).await.unwrap().unwrap();
        sleep(Duration::from_millis(50)).await;
    }
}

// Field case 2.3
#[tokio::test]
async fn a_new_connection_replaces_the_one_that_has_waited_longest() {
    let limits = Limits { max_connections: 4, ..Limits::default() };
    let server = Server::start(hello(), limits);
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(server.connect().await);
        sleep(Duration::from_millis(20)).await;
    }
    // The oldest connection has sent part of a head, but also counts as waiting for a request.
    silent[0].send("GET / HT").await;
    let mut client = server.connect().await;
    get_ok(&mut client).await;
    closed_after(silent.remove(0)).await;
    for client in &mut silent {
        get_ok(client).await;
    }
}

// Field case 2.3
#[tokio::test]
async fn connection_without_a_slot_is_answered_503() {
    let hang = async || std::future::pending::<()>().await;
    let limits = Limits { max_connections: 2, ..Limits::default() };
    let server = Server::start(Router::new().route("/", get(hang)), limits);
    let mut busy = Vec::new();
    for _ in 0..2 {
        let mut client = server.connect().await;
        client.send(GET).await;
        busy.push(client);
    }
    // Until the server has read both requests, a new connection may replace one of them.
    sleep(Duration::from_millis(300)).await;
    for _ in 0..3 {
        let mut client = server.connect().await;
        client.send(GET).await;
        let response = client.reply().await;
        assert_eq!(response.status, 503);
        assert!(response.head.contains("retry-after: 1\r\n"), "{response:?}");
        assert!(response.body.contains("too many connections"), "{response:?}");
    }
}

// Field case 1.5
#[tokio::test]
async fn stopping_server_waits_until_responses_are_read() {
    let server = Server::start(refusing(), Limits::default());
    let mut client = server.connect().await;
    client.send(format!("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", 1 << 20)).await;
    assert_eq!(client.reply().await.status, 413);
    let sending = tokio::spawn(async move {
        client.send(vec![b'a'; 1 << 20]).await;
    });
    server.stop().await;
    sending.await.unwrap();
}
