//! Tests of HTTP/1.1 responses, also of those that a hostile or broken server sends. Property tests
//! compare the client with hyper's.

use std::io::Cursor;
use std::pin::pin;

use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use tokio::io::{join, repeat, sink};
use tokio::net::{TcpListener, TcpStream};

use super::*;

/// A server that has sent these pieces. The client receives one after the other.
fn server_of(first: Vec<u8>, rest: impl AsyncRead + Send + Unpin + 'static) -> Connection {
    Connection::new(join(Cursor::new(first).chain(rest), sink()))
}

/// The status and the body of a response that arrives in two pieces.
async fn exchange(
    mut response: Vec<u8>,
    split_at: usize,
) -> Result<(StatusCode, Vec<u8>), ExchangeError> {
    let rest = response.split_off(split_at);
    let mut connection = server_of(response, Cursor::new(rest));
    let head = connection.send(b"GET / HTTP/1.1\r\n\r\n").await?;
    let mut body = ReceivedBody::default();
    connection.receive_body(head.body_length, &mut body).await?;
    Ok((head.status, body.bytes))
}

/// The status and the body of a response as hyper's client receives them.
async fn hyper_exchange(response: Vec<u8>) -> Option<(StatusCode, Vec<u8>)> {
    let (client, mut server) = tokio::io::duplex(1 << 16);
    let (mut sender, connection) = http1::handshake(TokioIo::new(client)).await.unwrap();
    tokio::spawn(connection);
    let serving = async {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            server.read_buf(&mut request).await.unwrap();
        }
        server.write_all(&response).await.unwrap();
        server.shutdown().await.unwrap();
        // Keep the other direction open, so that the client meets no error when it writes.
        std::future::pending::<()>().await;
    };
    let receiving = async {
        let request = Request::get("/").body(Empty::<Bytes>::new()).unwrap();
        let response = sender.send_request(request).await.ok()?;
        let status = response.status();
        Some((status, response.into_body().collect().await.ok()?.to_bytes().to_vec()))
    };
    tokio::select! {
        received = pin!(receiving) => received,
        () = serving => unreachable!("the server never ends"),
    }
}

fn response() -> impl Strategy<Value = Vec<u8>> {
    let interim = select(vec![
        "HTTP/1.1 100 Continue\r\n\r\n",
        "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\nContent-Length: x\r\n\r\n",
        "\r\n",
    ]);
    let status_line = select(vec![
        "HTTP/1.1 200 OK",
        "HTTP/1.1 200",
        "HTTP/1.0 200 OK",
        "HTTP/1.1 404 Not Found",
        "HTTP/1.1 204 No Content",
        "HTTP/1.1 304 Not Modified",
        "HTTP/1.1 101 Switching Protocols",
        "HTTP/1.1 999 ",
        "HTTP/1.1 099 Low",
        "HTTP/2.0 200 OK",
        "200 OK",
    ]);
    let field = select(vec![
        "Content-Length: 5",
        "content-length: 5, 5",
        "Content-Length:7",
        "Content-Length: +5",
        "Content-Length: ",
        "Content-Length: 18446744073709551616",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: gzip, Chunked",
        "Transfer-Encoding: chunked, gzip",
        "Connection: close",
        "Content-Type: application/json",
        "Bad name: x",
        "No colon",
    ]);
    let body = select(vec![
        "",
        "hello",
        "hello, world",
        "5\r\nhello\r\n0\r\n\r\n",
        "2;name=value\r\nhe\r\n03\r\nllo\r\n0\r\nTrailer: x\r\n\r\nmore",
        "5\r\nhello0\r\n\r\n",
        "5\nhello\n0\n\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "fffffffffffffffff\r\nhello",
        "0\r\n\r\n",
    ]);
    (vec(interim, 0..3), status_line, vec(field, 0..3), body).prop_map(
        |(interim, status_line, fields, body)| {
            let head = [&[status_line], fields.as_slice()].concat().join("\r\n");
            format!("{}{head}\r\n\r\n{body}", interim.concat()).into_bytes()
        },
    )
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn responses_are_received_as_hyper_receives_them(
        mut response in response(),
        end in prop_oneof![3 => Just(None), 1 => any::<Index>().prop_map(Some)],
        split_at: Index,
        // hyper ignores a value with a byte that is not ASCII, which is not worth copying.
        change in prop_oneof![3 => Just(None), 1 => (any::<Index>(), 0..128_u8).prop_map(Some)],
    ) {
        if let Some((at, byte)) = change {
            let at = at.index(response.len());
            response[at] = byte;
        }
        if let Some(end) = end {
            response.truncate(end.index(response.len()));
        }
        let split_at = split_at.index(response.len() + 1);
        let (ours, hypers) = run(async {
            (exchange(response.clone(), split_at).await, hyper_exchange(response.clone()).await)
        });
        prop_assert_eq!(ours.ok(), hypers, "{}", response.escape_ascii());
    }

    #[test]
    fn any_bytes_are_received_without_a_panic(response: Vec<u8>, split_at: Index) {
        let split_at = split_at.index(response.len() + 1);
        _ = run(exchange(response, split_at));
    }
}

/// Receives a response that begins with `start`, and goes on with `endless` forever. Returns the
/// error, and how many bytes the connection held then.
async fn receive_endless(start: &str, endless: u8) -> (ExchangeError, usize) {
    let mut connection = server_of(start.as_bytes().to_vec(), repeat(endless));
    let error = match connection.send(b"").await {
        Err(error) => error,
        Ok(head) => {
            let mut body = ReceivedBody::default();
            connection.receive_body(head.body_length, &mut body).await.unwrap_err()
        }
    };
    (error, connection.received.len())
}

#[tokio::test]
async fn a_response_without_an_end_is_refused_with_little_memory() {
    let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let interim = "HTTP/1.1 103 Early Hints\r\n\r\n".repeat(5_000);
    for (start, endless) in [
        ("HTTP/1.1 200 ".to_owned(), b'x'),
        ("HTTP/1.1 200 OK\r\nX: ".to_owned(), b'x'),
        (interim, b'x'),
        // Empty lines before the response.
        (String::new(), b'\n'),
        (format!("{chunked}5;"), b'x'),
        (format!("{chunked}0\r\nX: "), b'x'),
    ] {
        let (error, held) = receive_endless(&start, endless).await;
        let is_too_large = matches!(error, ExchangeError::Invalid(InvalidResponse::TooLarge(_)));
        let shown = &start[..start.len().min(80)];
        assert!(is_too_large, "{shown:?}: {error}");
        assert!(held <= HEAD_BYTES_MAX + RECEIVE_BYTES, "{shown:?}: {held} bytes");
    }
}

#[tokio::test]
async fn a_head_with_too_many_fields_is_refused() {
    let head = |fields: usize| {
        format!("HTTP/1.1 200 OK\r\n{}Content-Length: 0\r\n\r\n", "X: y\r\n".repeat(fields))
    };
    let receive = async |fields| exchange(head(fields).into_bytes(), 0).await;
    receive(FIELDS_MAX - 1).await.unwrap();
    let error = receive(FIELDS_MAX).await.unwrap_err();
    assert!(error.to_string().contains("too many headers"), "{error}");
}

#[tokio::test]
async fn an_endless_body_is_cut() {
    for head in [
        "HTTP/1.1 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551615\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
    ] {
        let mut connection = server_of(head.as_bytes().to_vec(), repeat(b'x'));
        let head = connection.send(b"").await.unwrap();
        let mut body = ReceivedBody::default();
        connection.receive_body(head.body_length, &mut body).await.unwrap();
        assert!(body.is_truncated);
        assert_eq!(body.bytes.len(), super::super::answer::MAX_BODY_BYTES);
        assert!(connection.received.len() <= RECEIVE_BYTES);
    }
}

/// Whether the connection can be used again after this response.
async fn is_reusable(response: &str) -> bool {
    let mut connection = server_of(response.as_bytes().to_vec(), Cursor::new(Vec::new()));
    let head = connection.send(b"").await.unwrap();
    connection.receive_body(head.body_length, &mut ReceivedBody::default()).await.unwrap();
    connection.finish_response() && head.keeps_alive
}

#[tokio::test]
async fn only_a_connection_that_the_server_keeps_open_is_reusable() {
    for response in [
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1",
        "HTTP/1.1 204 No Content\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n1\r\n0\r\n\r\n",
        "HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 0\r\n\r\n",
    ] {
        assert!(is_reusable(response).await, "{response}");
    }
    for response in [
        "HTTP/1.1 200 OK\r\nConnection: x, Close\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nConnection: close\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 101 Switching Protocols\r\n\r\n",
        // The body ends with the connection.
        "HTTP/1.1 200 OK\r\n\r\n1",
        // Bytes after the response would be taken for the beginning of the next one.
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1HTTP/1.1 200 OK\r\n",
    ] {
        assert!(!is_reusable(response).await, "{response}");
    }
}

#[tokio::test]
async fn a_waiting_or_idle_connection_holds_no_buffer() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut server, _) = listener.accept().await.unwrap();
    let mut connection = Connection::new(stream);
    // The server does not answer yet, so sending stops where it waits for the response.
    assert!(connection.send(b"GET / HTTP/1.1\r\n\r\n").now_or_never().is_none());
    assert_eq!(connection.received.capacity(), 0);
    server.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
    connection.send(b"").await.unwrap();
    assert!(connection.received.capacity() > 0);
    assert!(connection.finish_response());
    assert_eq!(connection.received.capacity(), 0);
    // What a lookup adds to its task while it waits.
    let size = size_of_val(&connection.send(b""));
    assert!(size <= 256, "{size} bytes");
}

#[tokio::test]
async fn only_an_end_before_the_first_byte_precedes_the_response() {
    for (response, expected) in [("", true), ("H", false), ("HTTP/1.1 200 OK\r\n", false)] {
        let mut connection = server_of(response.as_bytes().to_vec(), Cursor::new(Vec::new()));
        let error = connection.send(b"").await.unwrap_err();
        assert!(matches!(error, ExchangeError::Closed), "{error}");
        assert_eq!(connection.ended_before_response(&error), expected, "{response}");
    }
    let mut invalid = server_of(b"not HTTP".to_vec(), Cursor::new(Vec::new()));
    let error = invalid.send(b"").await.unwrap_err();
    assert!(!invalid.ended_before_response(&error), "{error}");
}
