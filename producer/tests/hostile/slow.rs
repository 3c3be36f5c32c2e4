//! Clients that send slowly, or never read a response.

use std::time::Duration;

use testkit::{Queue, System, Wire, amqp_uri, producer_address};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{DEADLINE, Siege, allow_files, statuses};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trickling_connections_are_closed_and_delay_no_callback() {
    allow_files(12_000);
    let siege = Siege::begin(&[("HEADER_TIMEOUT", "6s"), ("BODY_TIMEOUT", "4s")]).await;
    let mut clients = JoinSet::new();
    for number in 0..5_000 {
        let mut stream = TcpStream::connect(siege.address).await.unwrap();
        if number % 2 == 0 {
            let head = "POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n";
            stream.write_all(head.as_bytes()).await.unwrap();
        }
        clients.spawn(trickle(stream));
    }
    let answers = timeout(2 * DEADLINE, clients.join_all()).await.unwrap();
    let mut timeouts = 0;
    for answer in answers {
        match statuses(&answer).as_slice() {
            [] => {}
            [408] => timeouts += 1,
            _ => panic!("{answer}"),
        }
    }
    // Clients that have sent a head receive a response.
    assert_eq!(timeouts, 2_500);
    siege.assert_withstood(0, 120).await;
}

/// Sends a byte per second until the server closes the connection, and returns the response.
async fn trickle(stream: TcpStream) -> String {
    let (mut reader, mut writer) = stream.into_split();
    let mut answer = Vec::new();
    let sending = async {
        while writer.write_all(b"a").await.is_ok() {
            sleep(Duration::from_secs(1)).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        _ = reader.read_to_end(&mut answer) => {}
        () = sending => {}
    }
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn clients_that_never_read_are_disconnected() {
    let queue = Queue::new();
    let system = System::of_producers(&amqp_uri(), &queue);
    let limits = [("HEADER_TIMEOUT", "2s"), ("MAX_CONNECTIONS", "2")];
    let producer = system.start("producer", &limits).await;
    let address = producer_address(&producer).await;
    // The response repeats the long path, so a few responses fill the buffers.
    let request = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(8_000));
    let mut clients = Vec::new();
    for _ in 0..2 {
        let socket = TcpSocket::new_v4().unwrap();
        // A small buffer, so that it holds little of the responses.
        socket.set_recv_buffer_size(4_096).unwrap();
        let mut stream = socket.connect(address).await.unwrap();
        let request = request.clone();
        clients.push(tokio::spawn(async move {
            while stream.write_all(request.as_bytes()).await.is_ok() {}
        }));
    }
    for client in clients {
        timeout(DEADLINE, client).await.unwrap().unwrap();
    }
    let mut wire = Wire::connect(address).await;
    assert_eq!(wire.post_callback(1).await.status, 200);
}

// Field case 2.1
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_never_read_an_error_response_hold_little_memory() {
    const CLIENTS: usize = 1_000;
    const CLIENTS_PER_BATCH: usize = 500;
    allow_files(4_000);
    let siege = Siege::begin(&[]).await;
    // serde's error quotes each of these characters as `\u{301}`, which takes eight bytes in JSON.
    let value = "\u{301}".repeat(100 << 10);
    let body = format!(r#"{{"object_ids":"{value}"}}"#);
    let length = body.len();
    let request =
        format!("POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}");
    let request: &'static [u8] = Box::leak(request.into_bytes().into());
    let mut silent = Vec::new();
    for _ in 0..CLIENTS / CLIENTS_PER_BATCH {
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS_PER_BATCH {
            let socket = TcpSocket::new_v4().unwrap();
            socket.set_recv_buffer_size(4_096).unwrap();
            let address = siege.address;
            clients.spawn(async move {
                let mut stream = socket.connect(address).await.unwrap();
                timeout(DEADLINE, stream.write_all(request)).await.unwrap().unwrap();
                // The response has arrived, and stays unread.
                timeout(DEADLINE, stream.readable()).await.unwrap().unwrap();
                stream
            });
        }
        silent.extend(clients.join_all().await);
    }
    // If the producer did not truncate the error, the responses would take 800 MiB.
    siege.assert_withstood(0, 64).await;
    drop(silent);
}
