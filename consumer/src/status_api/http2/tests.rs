//! Tests with a server that answers as the test says, so no test depends on timing.

use std::task::Context;

use futures_util::future::join_all;
use http::{Response, StatusCode};
use hyper::body::Bytes;
use testkit::{Authority, Http2Api, Http2Lookup, PATIENCE, wait_until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::*;
use crate::status_api::answer::MAX_BODY_BYTES;
use crate::status_api::pool::Exchange;
use crate::status_api::request::RequestTemplate;

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

async fn start(stream_limit: Option<u32>) -> (Http2Api, Arc<ConnectionPool>) {
    let authority = Authority::new();
    let server = Http2Api::start(&authority, stream_limit).await;
    let pool = ConnectionPool::trusting(&authority, "localhost", server.address());
    (server, Arc::new(pool))
}

/// Starts a lookup of object `id`, which returns the body.
fn look_up(pool: &Arc<ConnectionPool>, id: i64) -> JoinHandle<Result<Vec<u8>, ExchangeError>> {
    let pool = Arc::clone(pool);
    let looking_up = async move {
        let mut exchange = send(&pool, id).await?;
        let mut body = ReceivedBody::default();
        exchange.receive_body(BodyLength::UntilClose, &mut body).await?;
        Ok(body.bytes)
    };
    tokio::spawn(async { timeout(PATIENCE, looking_up).await.unwrap() })
}

async fn send(pool: &ConnectionPool, id: i64) -> Result<Exchange, ExchangeError> {
    let template = RequestTemplate::new(&"https://api:8443/v1".parse().unwrap());
    let (exchange, head) = pool.send(&template.about(id, Some(TRACEPARENT))).await?;
    assert_eq!(head.status, StatusCode::OK);
    assert!(matches!(exchange, Exchange::Http2(_)));
    Ok(exchange)
}

async fn next(server: &mut Http2Api, count: usize) -> Vec<Http2Lookup> {
    let mut lookups = Vec::new();
    while lookups.len() < count {
        lookups.push(server.next().await);
    }
    lookups
}

async fn answer_next(server: &mut Http2Api, connection: usize) {
    let lookup = server.next().await;
    assert_eq!(lookup.connection, connection);
    lookup.answer();
}

/// Waits until the client resets the stream.
async fn assert_reset(
    mut poll_reset: impl FnMut(&mut Context<'_>) -> Poll<Result<Reason, h2::Error>>,
) {
    let reason = timeout(PATIENCE, poll_fn(|context| poll_reset(context))).await;
    assert_eq!(reason.unwrap().unwrap(), Reason::CANCEL);
}

#[tokio::test]
async fn lookups_share_a_connection_and_send_all_fields() {
    let (mut server, pool) = start(None).await;
    for _ in 0..2 {
        let answers: Vec<_> = (1..=3).map(|id| look_up(&pool, id)).collect();
        for lookup in next(&mut server, 3).await {
            assert_eq!(lookup.connection, 0);
            let request = &lookup.request;
            assert_eq!(request.uri().authority().unwrap(), "api:8443");
            assert!(request.uri().path().starts_with("/v1/objects/"), "{}", request.uri());
            assert_eq!(request.headers()["traceparent"], TRACEPARENT);
            lookup.answer();
        }
        for (id, answer) in (1..=3).zip(answers) {
            let expected = format!(r#"{{"id":{id},"online":true}}"#);
            assert_eq!(answer.await.unwrap().unwrap(), expected.as_bytes());
        }
    }
}

#[tokio::test]
async fn stream_limit_determines_the_number_of_connections() {
    for (stream_limit, lookups, expected) in [(Some(10), 95, 10), (None, STREAMS_MAX + 1, 2)] {
        let (mut server, pool) = start(stream_limit).await;
        let answers: Vec<_> = (0..lookups).map(|_| look_up(&pool, 1)).collect();
        // The server would refuse a stream that exceeds its limit, and the client would repeat it.
        let arrived = next(&mut server, lookups).await;
        assert_eq!(server.open_connections(), expected, "{stream_limit:?}");
        arrived.into_iter().for_each(Http2Lookup::answer);
        assert!(join_all(answers).await.into_iter().all(|answer| answer.unwrap().is_ok()));
        assert!(!server.has_next());
    }
}

#[tokio::test]
async fn refused_stream_is_sent_once_more_on_another_connection() {
    let (mut server, pool) = start(None).await;
    let answer = look_up(&pool, 1);
    server.next().await.respond.send_reset(Reason::REFUSED_STREAM);
    answer_next(&mut server, 1).await;
    answer.await.unwrap().unwrap();

    let refused_twice = look_up(&pool, 2);
    for connection in [0, 1] {
        let mut lookup = server.next().await;
        assert_eq!(lookup.connection, connection);
        lookup.respond.send_reset(Reason::REFUSED_STREAM);
    }
    let error = refused_twice.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");

    let failed = look_up(&pool, 3);
    server.next().await.respond.send_reset(Reason::INTERNAL_ERROR);
    failed.await.unwrap().unwrap_err();
    assert!(!server.has_next());
}

#[tokio::test]
async fn lookups_on_an_ending_connection_are_sent_again_if_it_answered() {
    let (mut server, pool) = start(None).await;
    let fresh = look_up(&pool, 1);
    let lookup = server.next().await;
    lookup.disconnect.cancel();
    fresh.await.unwrap().unwrap_err();
    assert!(!server.has_next());

    let used = look_up(&pool, 2);
    answer_next(&mut server, 1).await;
    used.await.unwrap().unwrap();
    let answers = [look_up(&pool, 3), look_up(&pool, 4)];
    let lookups = next(&mut server, 2).await;
    lookups[0].disconnect.cancel();
    for _ in &answers {
        answer_next(&mut server, 2).await;
    }
    assert!(join_all(answers).await.into_iter().all(|answer| answer.unwrap().is_ok()));
}

#[tokio::test]
async fn cancelled_lookup_resets_its_stream_and_leaves_a_silent_connection() {
    let (mut server, pool) = start(None).await;
    let [answered, cancelled] = [1, 2].map(|id| look_up(&pool, id));
    let mut lookups = next(&mut server, 2).await;
    lookups.sort_by_key(|lookup| lookup.request.uri().path().to_owned());
    let mut second = lookups.remove(1);
    lookups.remove(0).answer();
    answered.await.unwrap().unwrap();
    cancelled.abort();
    assert_reset(|context| second.respond.poll_reset(context)).await;
    // The server has answered the other lookup meanwhile.
    let cancelled = look_up(&pool, 3);
    let mut lookup = server.next().await;
    assert_eq!(lookup.connection, 0);
    cancelled.abort();
    assert_reset(|context| lookup.respond.poll_reset(context)).await;
    let answer = look_up(&pool, 4);
    answer_next(&mut server, 1).await;
    answer.await.unwrap().unwrap();
    // The silent connection has no streams left.
    pool.shared().drop_unused(Instant::now());
    wait_until("it is closed", async || server.open_connections() == 1).await;
}

#[tokio::test]
async fn stream_with_a_stalled_body_is_reset() {
    let (mut server, pool) = start(None).await;
    let (exchange, mut stalled) = tokio::join!(send(&pool, 1), async {
        server.next().await.respond.send_response(Response::default(), false).unwrap()
    });
    let mut body = ReceivedBody::default();
    let mut exchange = exchange.unwrap();
    let receiving = exchange.receive_body(BodyLength::UntilClose, &mut body);
    assert!(receiving.now_or_never().is_none());
    drop(exchange);
    assert_reset(|context| stalled.poll_reset(context)).await;
    let answer = look_up(&pool, 2);
    answer_next(&mut server, 0).await;
    answer.await.unwrap().unwrap();
}

#[tokio::test]
async fn too_large_body_is_cut_and_its_stream_reset() {
    let (mut server, pool) = start(None).await;
    for _ in 0..3 {
        let answer = look_up(&pool, 1);
        let mut lookup = server.next().await;
        assert_eq!(lookup.connection, 0);
        let mut body = lookup.respond.send_response(Response::default(), false).unwrap();
        body.send_data(Bytes::from(vec![b'x'; 1 << 20]), false).unwrap();
        assert_eq!(answer.await.unwrap().unwrap().len(), MAX_BODY_BYTES);
        assert_reset(|context| body.poll_reset(context)).await;
    }
}

#[tokio::test]
async fn too_large_head_is_refused() {
    let (mut server, pool) = start(None).await;
    for (reason, fields, bytes) in [
        (None, FIELDS_MAX - 1, 1),
        (Some("too many headers"), FIELDS_MAX, 1),
        (Some("protocol error"), 1, HEAD_BYTES_MAX as usize),
    ] {
        let answer = look_up(&pool, 1);
        let mut lookup = server.next().await;
        assert_eq!(lookup.connection, 0);
        let mut head = Response::builder().header("content-length", 0);
        for number in 0..fields {
            head = head.header(format!("x-{number}"), "x".repeat(bytes));
        }
        lookup.respond.send_response(head.body(()).unwrap(), true).unwrap();
        match (answer.await.unwrap(), reason) {
            (Ok(_), None) => {}
            (Err(error), Some(reason)) => {
                assert!(error.to_string().contains(reason), "{error}");
            }
            (answer, _) => panic!("{reason:?}: {answer:?}"),
        }
    }
}

#[tokio::test]
async fn connection_without_streams_is_closed_after_the_timeout() {
    let (mut server, pool) = start(None).await;
    let answer = look_up(&pool, 1);
    let lookup = server.next().await;
    pool.shared().drop_unused(Instant::now() + IDLE_TIMEOUT);
    lookup.answer();
    answer.await.unwrap().unwrap();
    pool.shared().drop_unused(Instant::now());
    let answer = look_up(&pool, 2);
    answer_next(&mut server, 0).await;
    answer.await.unwrap().unwrap();
    pool.shared().drop_unused(Instant::now() + IDLE_TIMEOUT);
    wait_until("it is closed", async || server.open_connections() == 0).await;
}

#[tokio::test]
async fn http2_is_used_when_the_server_begins_to_offer_it() {
    let (mut server, pool) = start(None).await;
    pool.shared().is_chosen.store(false, Ordering::Relaxed);
    for id in [1, 2] {
        let answer = look_up(&pool, id);
        answer_next(&mut server, 0).await;
        answer.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn http2_is_not_offered_if_it_is_turned_off() {
    let authority = Authority::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = authority.acceptor(&[ALPN, b"http/1.1"]);
    for is_on in [true, false] {
        let pool = ConnectionPool::offering(is_on, &authority, "localhost", address);
        assert_eq!(pool.shared().is_chosen(), is_on);
        let accept = async {
            let accepted = listener.accept().await.unwrap().0;
            let stream = acceptor.accept(accepted).await.unwrap();
            stream.get_ref().1.alpn_protocol() == Some(ALPN)
        };
        tokio::select! {
            chosen = accept => assert_eq!(chosen, is_on),
            // Without a response, the lookup does not end.
            _ = send(&pool, 1) => unreachable!("the server has not answered"),
        }
    }
}

/// A server that sends what the test says, frame by frame.
struct RawServer {
    acceptor: TlsAcceptor,
    listener: TcpListener,
}

struct RawConnection(TlsStream<TcpStream>);

const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;

impl RawServer {
    async fn start() -> (Self, Arc<ConnectionPool>) {
        let authority = Authority::new();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let pool = ConnectionPool::trusting(&authority, "localhost", address);
        (Self { acceptor: authority.acceptor(&[ALPN]), listener }, Arc::new(pool))
    }

    async fn accept(&self) -> RawConnection {
        let accepted = timeout(PATIENCE, self.listener.accept()).await.unwrap();
        let mut stream = self.acceptor.accept(accepted.unwrap().0).await.unwrap();
        let mut preface = *b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        stream.read_exact(&mut preface).await.unwrap();
        let mut connection = RawConnection(stream);
        connection.send(SETTINGS, 0, &[]).await;
        connection
    }
}

impl RawConnection {
    /// Sends a frame that ends the stream and the head, where this applies.
    async fn send(&mut self, kind: u8, stream: u8, payload: &[u8]) {
        let flags = if kind == HEADERS { 0x5 } else { 0 };
        let length = u8::try_from(payload.len()).unwrap();
        let frame = [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat();
        self.0.write_all(&frame).await.unwrap();
        self.0.flush().await.unwrap();
    }

    /// Waits for the next request, and returns the stream.
    async fn next_request(&mut self) -> u8 {
        loop {
            let mut head = [0; 9];
            self.0.read_exact(&mut head).await.unwrap();
            let length = usize::from(head[1]) * 256 + usize::from(head[2]);
            self.0.read_exact(&mut vec![0; length]).await.unwrap();
            if head[3] == HEADERS {
                return head[8];
            }
        }
    }

    async fn answer(&mut self, stream: u8) {
        // The only byte of this head is ":status: 200" in the static table of HPACK.
        self.send(HEADERS, stream, &[0x88]).await;
    }
}

#[tokio::test]
async fn after_a_goaway_only_unprocessed_lookups_are_sent_again() {
    let (server, pool) = RawServer::start().await;
    let processed = look_up(&pool, 1);
    let mut first = server.accept().await;
    assert_eq!(first.next_request().await, 1);
    let unprocessed = look_up(&pool, 2);
    assert_eq!(first.next_request().await, 3);
    // The last stream that the server processes is 1, and there is no error.
    first.send(GOAWAY, 0, &[0, 0, 0, 1, 0, 0, 0, 0]).await;

    let mut second = server.accept().await;
    assert_eq!(second.next_request().await, 1);
    second.answer(1).await;
    unprocessed.await.unwrap().unwrap();
    let later = look_up(&pool, 3);
    assert_eq!(second.next_request().await, 3);
    second.answer(3).await;
    later.await.unwrap().unwrap();
    assert!(!processed.is_finished());
    first.answer(1).await;
    processed.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_debug_data_of_a_goaway_is_cut() {
    let (server, pool) = RawServer::start().await;
    let failed = look_up(&pool, 1);
    for _ in 0..2 {
        let mut connection = server.accept().await;
        connection.next_request().await;
        let debug_data = [&[0; 8], [b'\n'; 200].as_slice()].concat();
        connection.send(GOAWAY, 0, &debug_data).await;
    }
    let error = failed.await.unwrap().unwrap_err().to_string();
    assert!(error.len() < 300 && !error.contains('\n'), "{error}");
}
