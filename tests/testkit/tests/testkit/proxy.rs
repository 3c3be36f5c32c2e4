use std::io::ErrorKind;
use std::time::Duration;

use testkit::Proxy;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// Time in which unexpected bytes would arrive.
const A_WHILE: Duration = Duration::from_millis(200);
const DEADLINE: Duration = Duration::from_secs(10);

/// A proxy in front of an echo server.
async fn proxied_echo() -> Proxy {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    Proxy::start(address.to_string()).await
}

async fn echo(stream: &mut TcpStream) -> std::io::Result<[u8; 4]> {
    let mut answer = [0; 4];
    stream.write_all(b"ping").await?;
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

async fn echoes(stream: &mut TcpStream) -> bool {
    timeout(DEADLINE, echo(stream)).await.unwrap().is_ok_and(|answer| &answer == b"ping")
}

#[tokio::test]
async fn silent_proxy_keeps_connections_and_delivers_when_restored() {
    let proxy = proxied_echo().await;
    let mut before = TcpStream::connect(proxy.addr()).await.unwrap();
    assert!(echoes(&mut before).await);

    proxy.silence();
    let mut during = TcpStream::connect(proxy.addr()).await.unwrap();
    let mut answer = [0; 4];
    for stream in [&mut before, &mut during] {
        stream.write_all(b"held").await.unwrap();
        assert!(timeout(A_WHILE, stream.read(&mut answer)).await.is_err(), "{answer:?}");
    }

    proxy.restore();
    for stream in [&mut before, &mut during] {
        timeout(DEADLINE, stream.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer, b"held");
        assert!(echoes(stream).await);
    }
}

#[tokio::test]
async fn cut_proxy_closes_all_connections_until_it_is_restored() {
    let proxy = proxied_echo().await;
    let mut before = TcpStream::connect(proxy.addr()).await.unwrap();
    assert!(echoes(&mut before).await);

    proxy.cut();
    assert!(!echoes(&mut before).await);
    let mut during = TcpStream::connect(proxy.addr()).await.unwrap();
    assert!(!echoes(&mut during).await);

    proxy.restore();
    let mut after = TcpStream::connect(proxy.addr()).await.unwrap();
    assert!(echoes(&mut after).await);
    // A cut that is restored at once ends connections all the same.
    proxy.cut();
    proxy.restore();
    let ended = timeout(DEADLINE, after.read(&mut [0; 4])).await.unwrap();
    assert!(matches!(ended, Ok(0)) || ended.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
}

#[tokio::test]
async fn proxy_forwards_the_end_of_one_direction() {
    let proxy = proxied_echo().await;
    let mut stream = TcpStream::connect(proxy.addr()).await.unwrap();
    stream.write_all(b"all of it").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    timeout(DEADLINE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, b"all of it");
}
