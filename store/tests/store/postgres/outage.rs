use std::net::SocketAddr;
use std::time::Duration;

use store::{Store, StoreError};
use testbed::{Database, Proxy, eventually, free_port};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;
use url::Url;

use super::{ids, start};
use crate::{DEADLINE, HOUR, delete_stale, ready, seen};

/// `url` with another address.
fn at(address: SocketAddr, url: &str) -> String {
    let mut url = Url::parse(url).unwrap();
    url.set_host(Some(&address.ip().to_string())).unwrap();
    url.set_port(Some(address.port())).unwrap();
    url.to_string()
}

/// The `host:port` of `url`.
fn server(url: &str) -> String {
    let url = Url::parse(url).unwrap();
    format!("{}:{}", url.host_str().unwrap(), url.port().unwrap_or(5432))
}

/// Waits until the database is away, and returns the reason.
async fn wait_until_away(store: &Store) -> String {
    let mut status = store.status();
    let status = timeout(DEADLINE, status.wait_for(Result::is_err)).await.unwrap().unwrap();
    status.clone().unwrap_err()
}

/// A proxy that can send new connections to another server, while old ones stay on theirs.
struct Switch {
    address: SocketAddr,
    target: watch::Sender<SocketAddr>,
}

impl Switch {
    async fn start(target: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", free_port())).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (target, watched) = watch::channel(target);
        tokio::spawn(async move {
            loop {
                let (mut client, _) = listener.accept().await.unwrap();
                let target = *watched.borrow();
                tokio::spawn(async move {
                    let mut server = TcpStream::connect(target).await?;
                    copy_bidirectional(&mut client, &mut server).await
                });
            }
        });
        Self { address, target }
    }
}

/// A proxy to `server` whose connections become silent once the server has sent `words`.
async fn silent_after(words: &'static [u8], server: String) -> SocketAddr {
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
    let mut status = store.status();
    let refused = |status: &Result<(), String>| {
        status.as_ref().is_err_and(|reason| reason.contains("refused"))
    };
    timeout(DEADLINE, status.wait_for(refused)).await.unwrap().unwrap();
    let reason = store.status().borrow().clone().unwrap_err();
    assert!(reason.starts_with("cannot connect: "), "{reason}");
    assert!(store.record_seen(&[seen(1, HOUR)]).await.is_err());
}

#[tokio::test]
async fn store_recovers_from_a_late_or_lost_database() {
    let database = Database::new().await;
    let proxy = Proxy::start(server(database.url())).await;
    proxy.cut();
    let store = start(&at(proxy.addr(), database.url()), 2);
    assert!(delete_stale(&store, HOUR, 1).await.is_err());
    wait_until_away(&store).await;
    proxy.restore();
    ready(&store).await;
    store.record_seen(&[seen(1, HOUR)]).await.unwrap();

    proxy.cut();
    let reason = wait_until_away(&store).await;
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
    let proxy = Proxy::start(server(database.url())).await;
    let store = start(&at(proxy.addr(), database.url()), 1);
    // The monitor has its own connection: no other one is open yet.
    ready(&store).await;
    proxy.silence();
    let recorded = timeout(DEADLINE, store.record_seen(&[seen(1, HOUR)])).await;
    assert!(matches!(recorded, Ok(Err(StoreError::NoConnection(_)))), "{recorded:?}");
    proxy.restore();
    eventually("sightings are recorded again", DEADLINE, async || {
        store.record_seen(&[seen(2, HOUR)]).await.ok()
    })
    .await;
}

/// The test takes the 12 s of a statement's deadline. The old connections stay silent without being
/// closed, as after a firewall has dropped them; only new connections work.
#[tokio::test]
async fn statement_to_a_silent_database_times_out_and_the_next_works() {
    let database = Database::new().await;
    let proxy = Proxy::start(server(database.url())).await;
    let switch = Switch::start(proxy.addr()).await;
    // Like the routine's store, which has one connection.
    let store = start(&at(switch.address, database.url()), 1);
    ready(&store).await;
    store.record_seen(&[seen(1, 2 * HOUR)]).await.unwrap();
    proxy.silence();
    let sightings = [seen(1, Duration::ZERO)];
    let record = timeout(DEADLINE, store.record_seen(&sightings));
    let (recorded, reason) = tokio::join!(record, wait_until_away(&store));
    assert!(matches!(recorded, Ok(Err(StoreError::Timeout(_)))), "{recorded:?}");
    assert!(reason.contains("no answer within"), "{reason}");

    let new_proxy = Proxy::start(server(database.url())).await;
    switch.target.send_replace(new_proxy.addr());
    ready(&store).await;
    eventually("sightings are recorded again", DEADLINE, async || {
        store.record_seen(&[seen(2, Duration::ZERO)]).await.ok()
    })
    .await;
}

#[tokio::test]
async fn silence_after_an_error_occupies_no_connection() {
    let database = Database::new().await;
    let proxy = silent_after(b"not_three", server(database.url())).await;
    // What is encrypted could not be searched.
    let mut url: Url = at(proxy, database.url()).parse().unwrap();
    url.query_pairs_mut().append_pair("sslmode", "disable");
    let store = start(url.as_str(), 1);
    ready(&store).await;
    let check = "ALTER TABLE object ADD CONSTRAINT not_three CHECK (id <> 3)";
    sqlx::query(check).execute(database.pool()).await.unwrap();
    let refused = timeout(DEADLINE, store.record_seen(&[seen(3, HOUR)])).await.unwrap();
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("not_three"), "{refused}");
    timeout(DEADLINE, store.record_seen(&[seen(1, HOUR)])).await.unwrap().unwrap();
}
