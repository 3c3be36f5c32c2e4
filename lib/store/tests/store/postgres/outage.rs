use std::net::SocketAddr;
use std::time::Duration;

use store::StoreError;
use testkit::{Database, Proxy, free_port};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use url::Url;

use super::{ids, start, wait_until_recorded};
use crate::{DEADLINE, HOUR, delete_stale, ready, seen, unready};

/// A proxy to the server of `url` whose connections become silent once the server has sent `words`.
async fn silent_after(words: &'static [u8], url: &str) -> SocketAddr {
    let url = Url::parse(url).unwrap();
    let server = format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5432));
    let listener = TcpListener::bind(("127.0.0.1", free_port())).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut server = TcpStream::connect(&server).await.unwrap();
            tokio::spawn(async move {
                let (mut from_client, mut to_client) = client.split();
                let (mut from_server, mut to_server) = server.split();
                let answers = async {
                    let mut buffer = vec![0; 64 << 10];
                    loop {
                        let answer = from_server.read(&mut buffer).await?;
                        to_client.write_all(&buffer[..answer]).await?;
                        if buffer[..answer].windows(words.len()).any(|part| part == words) {
                            std::future::pending::<()>().await;
                        }
                        if answer == 0 {
                            return to_client.shutdown().await;
                        }
                    }
                };
                tokio::try_join!(tokio::io::copy(&mut from_client, &mut to_server), answers)
            });
        }
    });
    address
}

#[tokio::test]
async fn refused_connection_is_reported_as_the_reason() {
    let url = format!("postgres://postgres@127.0.0.1:{}/postgres", free_port());
    let store = start(&url, 1);
    let reason = unready(&store, "refused").await;
    assert!(reason.starts_with("cannot connect: "), "{reason}");
    assert!(store.record_seen(&[seen(1, HOUR)]).await.is_err());
}

#[tokio::test]
async fn store_recovers_from_a_late_or_lost_database() {
    let database = Database::new().await;
    let (proxy, url) = Proxy::before(database.url()).await;
    proxy.cut();
    let store = start(&url, 2);
    assert!(delete_stale(&store, HOUR, 1).await.is_err());
    unready(&store, "").await;
    proxy.restore();
    ready(&store).await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();

    proxy.cut();
    let reason = unready(&store, "").await;
    assert!(!reason.is_empty());
    assert!(store.record_seen(&[seen(2, HOUR)]).await.is_err());
    proxy.restore();
    ready(&store).await;
    store.record_seen(&[seen(3, HOUR)]).await.unwrap();
    assert_eq!(ids(database.pool()).await, [1, 3]);
}

#[tokio::test]
async fn connection_that_a_silent_database_never_opens_is_given_up() {
    let database = Database::new().await;
    let (proxy, url) = Proxy::before(database.url()).await;
    let store = start(&url, 1);
    // The monitor has its own connection: no other one is open yet.
    ready(&store).await;
    proxy.silence();
    let recorded = timeout(DEADLINE, store.record_seen(&[seen(1, HOUR)])).await;
    assert!(matches!(recorded, Ok(Err(StoreError::NoConnection(_)))), "{recorded:?}");
    proxy.restore();
    wait_until_recorded(&store, seen(2, HOUR)).await;
}

/// The test takes the 12 s of a statement's deadline. The old connections stay silent without being
/// closed, as after a firewall has dropped them; only new connections work.
#[tokio::test]
async fn statement_to_a_silent_database_times_out_and_the_next_works() {
    let database = Database::new().await;
    let (proxy, url) = Proxy::before(database.url()).await;
    let (switch, url) = Proxy::before(&url).await;
    // Like the routine's store, which has one connection.
    let store = start(&url, 1);
    ready(&store).await;
    store.record_seen(&[seen(1, 2 * HOUR)]).await.unwrap();
    proxy.silence();
    let sightings = [seen(1, Duration::ZERO)];
    let record = timeout(DEADLINE, store.record_seen(&sightings));
    let (recorded, reason) = tokio::join!(record, unready(&store, ""));
    assert!(matches!(recorded, Ok(Err(StoreError::Timeout(_)))), "{recorded:?}");
    assert!(reason.contains("no answer within"), "{reason}");

    let (new_proxy, _) = Proxy::before(database.url()).await;
    switch.switch_to(new_proxy.addr().to_string());
    ready(&store).await;
    wait_until_recorded(&store, seen(2, Duration::ZERO)).await;
}

#[tokio::test]
async fn silence_after_an_error_occupies_no_connection() {
    let database = Database::new().await;
    let (proxy, url) = Proxy::before(database.url()).await;
    proxy.switch_to(silent_after(b"not_three", database.url()).await.to_string());
    // What is encrypted could not be searched.
    let store = start(&format!("{url}?sslmode=disable"), 1);
    ready(&store).await;
    let check = "ALTER TABLE object ADD CONSTRAINT not_three CHECK (id <> 3)";
    sqlx::query(check).execute(database.pool()).await.unwrap();
    let refused = timeout(DEADLINE, store.record_seen(&[seen(3, HOUR)])).await.unwrap();
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("not_three"), "{refused}");
    timeout(DEADLINE, store.record_seen(&[seen(1, HOUR)])).await.unwrap().unwrap();
}
