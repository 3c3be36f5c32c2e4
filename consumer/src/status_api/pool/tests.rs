use std::net::SocketAddr;

use futures_util::future::join_all;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use testkit::{Authority, Connections, PATIENCE, PlainStatusApi, TlsProxy, install_tls};
use tokio::time::timeout;

use super::*;
use crate::status_api::answer::ReceivedBody;

/// An idle timeout that no test reaches.
const LONG: Duration = Duration::from_hours(1);
const REQUEST: &[u8] = b"GET /objects/1 HTTP/1.1\r\nhost: api\r\n\r\n";

fn pool_of(url: &str) -> ConnectionPool {
    let url: Url = url.parse().unwrap();
    let address = url.socket_addrs(|| None).unwrap()[0];
    ConnectionPool::start(Addresses::fixed(&[address]), None, LONG)
}

/// Sends a lookup, receives the whole response, and returns the connection.
async fn look_up(pool: &ConnectionPool) -> Result<Connection, ExchangeError> {
    let (exchange, head) = pool.send(REQUEST).await?;
    let Exchange::Http1(mut connection) = exchange else { unreachable!("no server offers HTTP/2") };
    connection.receive_body(head.body_length, &mut ReceivedBody::default()).await?;
    assert!(head.keeps_alive && connection.finish_response());
    Ok(connection)
}

#[tokio::test]
async fn lookups_reuse_idle_connections() {
    let server = PlainStatusApi::start(Connections::StayOpen, |_| None);
    let pool = pool_of(&server.endpoint());
    for _ in 0..3 {
        let at_once = join_all((0..4).map(|_| look_up(&pool))).await;
        for connection in at_once {
            pool.keep(connection.unwrap());
        }
    }
    assert_eq!((server.requests(), server.connections()), (12, 4));
    assert_eq!(pool.idle.connections.lock().len(), 4);
}

#[tokio::test]
async fn a_lookup_on_a_closed_connection_is_sent_once_more_on_a_new_one() {
    let server = PlainStatusApi::start(Connections::CloseAtSecondRequest, |_| None);
    let pool = pool_of(&server.endpoint());
    let both = join_all([look_up(&pool), look_up(&pool)]).await;
    for connection in both {
        pool.keep(connection.unwrap());
    }
    // The server closes the reused connection when the request has arrived. The lookup must not
    // use the other idle connection, which would fail as well.
    look_up(&pool).await.unwrap();
    assert_eq!((server.requests(), server.connections()), (4, 3));
}

#[tokio::test]
async fn a_lookup_on_a_new_connection_is_sent_only_once() {
    let server = PlainStatusApi::start(Connections::CloseAtFirstRequest, |_| None);
    let error = look_up(&pool_of(&server.endpoint())).await.err().unwrap();
    assert!(matches!(error, ExchangeError::Closed | ExchangeError::Io(_)), "{error}");
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn a_connection_that_the_server_has_closed_is_not_reused() {
    let server = PlainStatusApi::start(Connections::CloseAfterResponse, |_| None);
    let pool = pool_of(&server.endpoint());
    let mut closed = look_up(&pool).await.unwrap();
    testkit::wait_until("the server closes", async || !closed.is_quiet()).await;
    pool.keep(closed);
    assert!(pool.idle.take(Instant::now()).is_none());
}

#[tokio::test]
async fn idle_connections_are_closed_after_the_timeout() {
    let idle = IdleConnections { timeout: IDLE_TIMEOUT, connections: Mutex::default() };
    let start = Instant::now();
    let (first, _first_server) = tokio::io::duplex(1);
    let (second, _second_server) = tokio::io::duplex(1);
    for (since, stream) in [(start, first), (start + IDLE_TIMEOUT / 2, second)] {
        idle.connections.lock().push((since, Connection::new(stream)));
    }
    idle.close_expired(start + IDLE_TIMEOUT);
    assert_eq!(idle.connections.lock().len(), 1);
    assert!(idle.take(start + IDLE_TIMEOUT * 2).is_none());
}

impl ConnectionPool {
    /// A pool for `https://{host}` that trusts only `authority`, and connects to `address`.
    pub(in crate::status_api) fn trusting(
        authority: &Authority,
        host: &str,
        address: SocketAddr,
    ) -> Self {
        Self::offering(true, authority, host, address)
    }

    pub(in crate::status_api) fn offering(
        http2: bool,
        authority: &Authority,
        host: &str,
        address: SocketAddr,
    ) -> Self {
        install_tls();
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(authority.pem().as_bytes()).unwrap()).unwrap();
        let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        let tls = Tls::with_config(host, config, http2).unwrap();
        Self::start(Addresses::fixed(&[address]), Some(tls), LONG)
    }

    pub(in crate::status_api) fn shared(&self) -> &SharedConnections {
        &self.http2
    }
}

#[tokio::test]
async fn lookups_use_http1_if_the_server_chooses_it() {
    let (server, authority) =
        (PlainStatusApi::start(Connections::StayOpen, |_| None), Authority::new());
    let proxy = TlsProxy::start(&authority, server.address()).await;
    let pool = ConnectionPool::trusting(&authority, "localhost", proxy.address());
    for _ in 0..3 {
        let at_once = join_all((0..4).map(|_| look_up(&pool))).await;
        for connection in at_once {
            pool.keep(connection.unwrap());
        }
    }
    assert_eq!((server.requests(), server.connections()), (12, 4));
}

#[tokio::test]
async fn a_certificate_must_be_trusted_and_name_the_host() {
    let (server, authority) =
        (PlainStatusApi::start(Connections::StayOpen, |_| None), Authority::new());
    let proxy = TlsProxy::start(&authority, server.address()).await;
    for (host, trusted, reason) in [
        ("127.0.0.1", &authority, "not valid for name"),
        ("localhost", &Authority::new(), "invalid peer certificate"),
    ] {
        let error = look_up(&ConnectionPool::trusting(trusted, host, proxy.address()))
            .await
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains(reason), "{host}: {error}");
    }
    assert_eq!(server.requests(), 0);
}

#[tokio::test]
async fn a_server_that_never_accepts_does_not_delay_lookups() {
    let server = PlainStatusApi::start(Connections::StayOpen, |_| None);
    let (_listener, _streams, hanging) = super::super::addresses::hanging().await;
    let addresses = Addresses::fixed(&[hanging, server.address()]);
    let pool = ConnectionPool::start(addresses, None, LONG);
    timeout(PATIENCE, look_up(&pool)).await.unwrap().unwrap();
}
