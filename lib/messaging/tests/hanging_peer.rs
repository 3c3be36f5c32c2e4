//! A connection to a hanging peer leaks nothing. This test has a binary of its own, because it
//! counts the threads and descriptors of its process.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::time::Duration;

use futures_util::future::join_all;
use messaging::amqp::{Access, ConnectError, connect};
use testkit::{Proxy, eventually};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const HEADER: &[u8] = b"AMQP\x00\x00\x09\x01";
const ATTEMPTS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(30);

/// Host and port of the shared broker.
fn broker() -> String {
    let uri = testkit::amqp_uri();
    uri.rsplit('@').next().unwrap().split('/').next().unwrap().to_owned()
}

fn access(address: &str, query: &str) -> Access {
    let uri = format!("amqp://guest:guest@{address}/%2f{query}");
    Access { uri: uri.parse().unwrap(), authorities: None }
}

/// The first frame that the broker sends, `connection.start`.
async fn greeting() -> Vec<u8> {
    let mut stream = TcpStream::connect(broker()).await.unwrap();
    stream.write_all(HEADER).await.unwrap();
    let mut frame = vec![0; 7];
    stream.read_exact(&mut frame).await.unwrap();
    let length = u32::from_be_bytes(frame[3..7].try_into().unwrap()) as usize;
    frame.resize(7 + length + 1, 0);
    stream.read_exact(&mut frame[7..]).await.unwrap();
    frame
}

/// Starts a peer that accepts connections, sends `greeting` and then nothing more. It keeps each
/// connection open. Returns its address.
async fn start_hanging_peer(greeting: Vec<u8>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        let mut open = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&greeting).await.unwrap();
            open.push(stream);
        }
    });
    address
}

fn io_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")));
    names.filter(|name| name.as_ref().is_ok_and(|name| name.starts_with("lapin-io"))).count()
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

async fn wait_until_io_threads_end() {
    eventually("lapin's threads end", PATIENCE, async || (io_threads() == 0).then_some(())).await;
}

// Field case 2.5
#[tokio::test]
async fn hanging_peer_leaks_no_thread_and_no_descriptor() {
    // The first connection of a process makes lapin's libraries start a runtime that stays.
    drop(connect(&access(&broker(), ""), "test").await.unwrap());
    wait_until_io_threads_end().await;
    for greeting in [Vec::new(), greeting().await] {
        let access = access(&start_hanging_peer(greeting).await, "");
        let before = descriptors();
        for attempt in join_all((0..ATTEMPTS).map(|_| connect(&access, "test"))).await {
            let error = attempt.err().unwrap();
            assert!(matches!(error, ConnectError::Silent { .. }), "{error}");
        }
        wait_until_io_threads_end().await;
        // The peer's ends of the connections are also in this process, and stay open.
        eventually("all other descriptors are closed", PATIENCE, async || {
            (descriptors() <= before + ATTEMPTS).then_some(())
        })
        .await;
    }

    // A peer that hangs later, on a connection without heartbeats.
    let proxy = Proxy::start(broker()).await;
    let link = connect(&access(&proxy.addr().to_string(), "?heartbeat=0"), "test").await.unwrap();
    assert_eq!(io_threads(), 1);
    proxy.silence();
    drop(link);
    wait_until_io_threads_end().await;
}
