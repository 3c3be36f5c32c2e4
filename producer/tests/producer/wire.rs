//! Raw HTTP, for tests in which the exact bytes and their timing matter.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// One connection to the producer.
pub(crate) struct Wire(TcpStream);

/// A parsed response.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Value,
}

impl Wire {
    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self(TcpStream::connect(address).await.unwrap())
    }

    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.write_all(bytes.as_ref()).await.unwrap();
    }

    /// Sends a whole callback with one id.
    pub(crate) async fn send_callback(&mut self, id: i64) {
        let body = format!(r#"{{"object_ids":[{id}]}}"#);
        let length = body.len();
        let head =
            format!("POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n");
        self.send(head + &body).await;
    }

    /// Reads one response and leaves the connection open.
    pub(crate) async fn reply(&mut self) -> Reply {
        timeout(DEADLINE, async {
            let head = self.head().await;
            let status = head.split(' ').nth(1).unwrap().parse().unwrap();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
            self.0.read_exact(&mut body).await.unwrap();
            let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
            Reply { status, head, body }
        })
        .await
        .unwrap()
    }

    async fn head(&mut self) -> String {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.0.read_u8().await.unwrap());
        }
        String::from_utf8(head).unwrap().to_lowercase()
    }

    /// Waits until the producer closes the connection.
    pub(crate) async fn closed(mut self) {
        let read = timeout(DEADLINE, self.0.read_to_end(&mut Vec::new())).await;
        // A reset also counts as an end.
        assert!(read.is_ok(), "the connection was not closed within {DEADLINE:?}");
    }
}
