//! Status APIs that close connections that the consumer keeps open.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use testbed::{Process, eventually};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_util::task::AbortOnDropHandle;

use crate::{PATIENCE, SECOND, TestEnv};

/// What the server does with a connection after the first response.
#[derive(Clone, Copy, Debug)]
enum AfterResponse {
    /// Keeps it open.
    KeepOpen,
    /// Closes it when the next request has arrived, without a response.
    CloseAtNextRequest,
    /// Closes it at once, although the response does not announce this.
    Close,
}

/// A server that answers "online" and then treats the connection as set.
struct Server {
    address: SocketAddr,
    counts: Arc<Counts>,
    _serving: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Counts {
    connections: AtomicUsize,
    requests: AtomicUsize,
}

impl Server {
    async fn start(after: AfterResponse) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let counts = Arc::new(Counts::default());
        let counted = Arc::clone(&counts);
        let serving = AbortOnDropHandle::new(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, after, Arc::clone(&counted)));
            }
        }));
        Self { address, counts, _serving: serving }
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    fn connections(&self) -> usize {
        self.counts.connections.load(Ordering::SeqCst)
    }

    fn requests(&self) -> usize {
        self.counts.requests.load(Ordering::SeqCst)
    }
}

async fn serve(stream: TcpStream, after: AfterResponse, counts: Arc<Counts>) {
    let mut stream = BufReader::new(stream);
    let mut is_counted = false;
    while let Some(id) = request(&mut stream).await {
        counts.requests.fetch_add(1, Ordering::SeqCst);
        if std::mem::replace(&mut is_counted, true) {
            if matches!(after, AfterResponse::CloseAtNextRequest) {
                return;
            }
        } else {
            counts.connections.fetch_add(1, Ordering::SeqCst);
        }
        let body = format!(r#"{{"id":{id},"online":true}}"#);
        let length = body.len();
        let response = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
        _ = stream.write_all(response.as_bytes()).await;
        if matches!(after, AfterResponse::Close) {
            return;
        }
    }
}

/// The id of the next request, unless the client has closed the connection.
async fn request(stream: &mut BufReader<TcpStream>) -> Option<i64> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read_until(b'\n', &mut head).await.ok()? == 0 {
            return None;
        }
    }
    let head = String::from_utf8(head).unwrap();
    // Field case 5.7.
    assert!(head.lines().next().unwrap().ends_with(" HTTP/1.1"), "{head}");
    let path = head.split(' ').nth(1).unwrap();
    Some(path.strip_prefix("/objects/").unwrap().parse().unwrap())
}

/// Publishes 20 ids and runs `max_lookups` lookups at once: with one, all on one connection if that stays open.
async fn assert_no_lookup_fails(after: AfterResponse, max_lookups: u32) {
    let env = TestEnv::new().await;
    let server = Server::start(after).await;
    env.publish(1..=20).await;
    let environment = [
        ("AMQP_URI", testbed::amqp_uri()),
        ("QUEUE_NAME", env.queue.name.clone()),
        ("DATABASE_URL", env.database.url().to_owned()),
        ("STATUS_API", server.endpoint()),
        ("MAX_CONSUMERS", max_lookups.to_string()),
    ];
    let consumer = Process::spawn("consumer", &environment, &[]);
    env.wait_until_recorded(1..=20).await;
    let failed = consumer.metric("lastseen_lookups_total{outcome=\"transport\"}").await;
    consumer.terminate();
    assert_eq!(consumer.wait().await.code(), Some(0));
    env.assert_all_settled().await;
    assert!(failed < 0.5, "{failed} lookups failed");
    // Each lookup but the first may meet one connection that was closed.
    assert!((20..40).contains(&server.requests()), "{} requests", server.requests());
}

// Field case 3.9.
#[tokio::test]
async fn a_lookup_on_a_connection_that_just_ended_is_sent_again() {
    assert_no_lookup_fails(AfterResponse::CloseAtNextRequest, 1).await;
    // The other idle connections have ended as well.
    assert_no_lookup_fails(AfterResponse::CloseAtNextRequest, 8).await;
}

// Field case 3.9.
#[tokio::test]
async fn an_api_that_closes_after_each_response_fails_no_lookup() {
    assert_no_lookup_fails(AfterResponse::Close, 1).await;
}

// Field case 3.9.
#[tokio::test]
async fn a_connection_is_idle_for_less_than_a_second() {
    let env = TestEnv::new().await;
    let server = Server::start(AfterResponse::KeepOpen).await;
    let consumer = env.start(&server.endpoint(), &[]);
    env.publish([1]).await;
    env.wait_until_recorded([1]).await;
    // Only a little longer than connections stay idle, because the rest takes time as well.
    sleep(SECOND * 6 / 10).await;
    env.publish([2]).await;
    env.wait_until_recorded([1, 2]).await;
    assert_eq!(server.connections(), 2);
    consumer.stop().await;
}

/// A fresh connection was not closed for being idle, so the API is at fault.
#[tokio::test]
async fn a_fresh_connection_that_ends_is_a_failed_lookup() {
    let env = TestEnv::new().await;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&requests);
    let _serving = AbortOnDropHandle::new(tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // The reachability check connects too, and sends nothing.
            if request(&mut BufReader::new(stream)).await.is_some() {
                counted.fetch_add(1, Ordering::SeqCst);
            }
        }
    }));
    env.publish([1]).await;
    let consumer = env.start(&endpoint, &[]);
    eventually("a lookup", PATIENCE, async || (requests.load(Ordering::SeqCst) > 0).then_some(()))
        .await;
    // A lookup that is sent again would arrive at once; the next attempt comes after a second.
    sleep(SECOND / 2).await;
    assert_eq!(requests.load(Ordering::SeqCst), 1);
    consumer.stop().await;
}
