//! Raw HTTP, for tests in which the exact bytes and their timing matter.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(30);

/// A connection to one of our servers.
#[derive(Debug)]
pub struct Wire(pub TcpStream);

/// An HTTP response as it came over the wire.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status code.
    pub status: u16,
    /// The status line and the headers.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Wire {
    /// Connects to the server at `address`.
    pub async fn connect(address: SocketAddr) -> Self {
        Self(TcpStream::connect(address).await.expect("the server should accept connections"))
    }

    /// Sends these bytes.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let sent = timeout(DEADLINE, self.0.write_all(bytes.as_ref())).await;
        sent.expect("the server should read").expect("the connection should be open");
    }

    /// Posts a callback with one id.
    pub async fn post_callback(&mut self, id: i64) -> Reply {
        let body = format!(r#"{{"object_ids":[{id}]}}"#);
        let length = body.len();
        let head =
            format!("POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
        self.send(head + &body).await;
        self.reply().await
    }

    /// Reads one response, which has a `content-length` or no body, and leaves the connection open.
    pub async fn reply(&mut self) -> Reply {
        let reply = timeout(DEADLINE, async {
            let mut text = Vec::new();
            while !text.ends_with(b"\r\n\r\n") {
                text.push(self.0.read_u8().await?);
            }
            let head = String::from_utf8_lossy(&text).into_owned();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length = length.map_or(Ok(0), str::parse).map_err(io::Error::other)?;
            let mut body = vec![0; length];
            self.0.read_exact(&mut body).await?;
            text.extend(body);
            parse(&text)
        });
        reply.await.expect("the server should answer").expect("the answer should be complete")
    }

    /// Waits until the server closes the connection, and returns the bytes up to then. A reset also
    /// counts as an end.
    pub async fn closed(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        let read = timeout(DEADLINE, self.0.read_to_end(&mut rest)).await;
        assert!(read.is_ok(), "the connection was not closed within {DEADLINE:?}");
        rest
    }
}

/// Gets `path` by HTTP/1.0, so that the server sends an unchunked response and then closes the
/// connection.
///
/// # Errors
/// When there is no complete response within 10 s.
pub async fn http_get(address: SocketAddr, path: &str) -> io::Result<Reply> {
    timeout(Duration::from_secs(10), async {
        let mut stream = TcpStream::connect(address).await?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        parse(&answer)
    })
    .await?
}

fn parse(answer: &[u8]) -> io::Result<Reply> {
    let text = String::from_utf8_lossy(answer);
    let parse = || {
        // The head ends with the line feed of its last header.
        let (head, body) = text.split_at(text.find("\r\n\r\n")? + 2);
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Reply { status, head: head.to_owned(), body: body[2..].to_owned() })
    };
    parse().ok_or_else(|| io::ErrorKind::InvalidData.into())
}
