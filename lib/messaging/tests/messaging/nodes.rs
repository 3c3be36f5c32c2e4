//! One usable node among unusable ones.

use messaging::amqp::{Access, ConnectError, connect};
use testkit::{LogCapture, free_port};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tracing::Level;

fn access(nodes: &[String]) -> Access {
    let uri = format!("amqp://guest:guest@{}/%2f", nodes.join(","));
    Access { uri: uri.parse().unwrap(), authorities: None }
}

/// Host and port of the shared broker.
fn broker() -> String {
    let uri = testkit::amqp_uri();
    uri.rsplit('@').next().unwrap().split('/').next().unwrap().to_owned()
}

/// A node that accepts connections and then says nothing.
async fn silent() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut open = Vec::new();
        loop {
            open.push(listener.accept().await.unwrap());
        }
    });
    address
}

/// A node that sends this answer to the client's header, and closes the connection.
async fn answering(answer: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            // Unread, the header would make the close discard the answer.
            stream.read_exact(&mut [0; 8]).await.unwrap();
            stream.write_all(answer).await.unwrap();
        }
    });
    address
}

fn refusing() -> String {
    format!("127.0.0.1:{}", free_port())
}

#[tokio::test]
async fn usable_node_is_found_in_any_order() {
    let nodes = [silent().await, refusing(), broker(), refusing()];
    // With four nodes, ten connections in random order almost never start with the same one.
    for _ in 0..10 {
        connect(&access(&nodes), "test").await.unwrap();
    }
}

#[tokio::test]
async fn unusable_node_is_logged_once_while_another_one_is_connected() {
    let log = LogCapture::start(Level::WARN, "messaging::amqp");
    let (silent, refusing, broker) = (silent().await, refusing(), broker());
    let (closing, http) = (answering(b"").await, answering(b"HTTP/1.1 400 Bad Request\r\n").await);
    for (node, user, reason) in [
        (&silent, "guest:guest", "no answer within 1s"),
        (&refusing, "guest:guest", "refused"),
        (&closing, "guest:guest", "cannot reach"),
        (&http, "guest:guest", "does not speak AMQP"),
        (&broker, "guest:s3cret", "cannot log in"),
    ] {
        let uri = format!("amqp://{user}@{node}/%2f,amqp://guest:guest@{broker}/%2f");
        let access = Access { uri: uri.parse().unwrap(), authorities: None };
        let named = format!("node={node} ");
        let connect = async || _ = connect(&access, "test").await.unwrap();
        // The order is random.
        for _ in 0..60 {
            if log.lines_with(&named).is_empty() {
                connect().await;
            }
        }
        for _ in 0..4 {
            connect().await;
        }
        let lines = log.lines_with(&named);
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(
            lines[0].contains(reason) && lines[0].contains("connected to another"),
            "{lines:?}"
        );
    }
    assert_eq!(log.lines_with("").len(), 5);
    assert!(log.lines_with("s3cret").is_empty());
}

#[tokio::test]
async fn error_names_all_nodes() {
    let nodes = [refusing(), refusing()];
    let error = connect(&access(&nodes), "test").await.err().unwrap();
    let text = error.to_string();
    assert!(matches!(&error, ConnectError::AllNodes(errors) if errors.len() == 2), "{text}");
    assert!(nodes.iter().all(|node| text.contains(node)), "{text}");
}

#[tokio::test]
async fn ipv6_literal_reaches_its_address() {
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let http_server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        // The client's header. Unread, it would make the close discard the response.
        stream.read_exact(&mut [0; 8]).await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
    });
    let error = connect(&access(std::slice::from_ref(&address)), "test").await.err().unwrap();
    http_server.await.unwrap();
    assert!(
        matches!(&error, ConnectError::Silent { address: named } if *named == address),
        "{error}"
    );
}
