//! The addresses of the status API's host.
//!
//! One tokio task resolves the name every few seconds, so the load of the name server does not
//! depend on the number of connections. The task keeps the last good result while the name server
//! fails. The reachability check records the addresses that it could not connect to; lookups try
//! these addresses last.
//!
//! Decision: docs/decisions/0029-how-is-the-status-apis-name-resolved.md

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use runtime::first_success;
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

const REFRESH_INTERVAL: Duration = Duration::from_secs(5);
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// If a name has more addresses than this, only the first ones are used.
const ADDRESSES_MAX: usize = 16;
/// How many addresses one lookup tries. Thousands of lookups may connect at once, and each of them
/// opens a socket for each address.
const LOOKUP_ADDRESSES_MAX: usize = 3;
/// How long the check waits for one address before it tries the next one as well.
const HEAD_START: Duration = Duration::from_millis(250);

/// The known addresses. Clones share them.
#[derive(Clone)]
pub(super) struct Addresses {
    known: Arc<watch::Sender<Known>>,
    /// The number of connections that the client has opened. Each tries another address first.
    connections: Arc<AtomicUsize>,
    /// The number of reachability checks. Each tries another address first.
    checks: Arc<AtomicUsize>,
    _refresh: Arc<AbortOnDropHandle<()>>,
}

#[derive(Default)]
struct Known {
    /// The result of the last successful resolution, in the resolver's order.
    addresses: Vec<Address>,
    /// The error of the last resolution, if it failed.
    error: Option<String>,
}

#[derive(Clone, Copy)]
struct Address {
    addr: SocketAddr,
    /// Whether the last check could not connect to it.
    failed: bool,
}

impl Addresses {
    /// Starts a tokio task that resolves `host`.
    pub(super) fn resolve(host: String, port: u16) -> Self {
        let known = Arc::new(watch::Sender::new(Known::default()));
        let refresh = tokio::spawn(refresh(host, port, Arc::clone(&known)));
        Self::new(known, refresh)
    }

    fn new(known: Arc<watch::Sender<Known>>, refresh: JoinHandle<()>) -> Self {
        let refresh = Arc::new(AbortOnDropHandle::new(refresh));
        Self { known, connections: Arc::default(), checks: Arc::default(), _refresh: refresh }
    }

    /// The addresses in the order in which to try them. Waits until the name was resolved once.
    ///
    /// # Errors
    /// When the name has never been resolved.
    async fn ordered(&self) -> io::Result<Vec<SocketAddr>> {
        let mut known = self.known.subscribe();
        // This cannot fail, because `self` holds the sender.
        let has_result = |known: &Known| !known.addresses.is_empty() || known.error.is_some();
        let known = known.wait_for(has_result).await.map_err(io::Error::other)?;
        if let (true, Some(error)) = (known.addresses.is_empty(), &known.error) {
            return Err(io::Error::other(error.clone()));
        }
        Ok(order(&known.addresses, self.connections.fetch_add(1, Ordering::Relaxed)))
    }

    /// Connects for lookups: to the first address that accepts. Tries the next address when one
    /// fails, or has not accepted after [`HEAD_START`], up to [`LOOKUP_ADDRESSES_MAX`].
    ///
    /// # Errors
    /// The error of the last address that failed.
    pub(super) async fn connect(&self) -> io::Result<TcpStream> {
        let addresses = self.ordered().await?.into_iter().take(LOOKUP_ADDRESSES_MAX);
        let attempts = addresses.map(TcpStream::connect);
        let connected = first_success(attempts, HEAD_START).await;
        connected.map(|success| success.value).map_err(|mut errors| {
            let last = errors.pop().map(|(_, error)| error);
            last.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into())
        })
    }

    /// Connects to any of the addresses: tries one, after `HEAD_START` the next one as well, and so
    /// on. Each call tries another address first, so that every address is checked now and then.
    ///
    /// # Errors
    /// The error of the last address that failed, or a timeout if none answered within `limit`.
    pub(super) async fn connect_to_any(&self, limit: Duration) -> io::Result<()> {
        let mut all = timeout(limit, self.ordered()).await.unwrap_or_else(|_| timed_out())?;
        all.sort_unstable();
        let first = self.checks.fetch_add(1, Ordering::Relaxed) % all.len().max(1);
        all.rotate_left(first);
        let mut attempts = FuturesUnordered::new();
        let mut waiting = all.iter().copied().enumerate();
        let mut failure = io::Error::from(io::ErrorKind::TimedOut);
        loop {
            let next = waiting.next();
            let has_more = waiting.len() > 0;
            if let Some((position, addr)) = next {
                attempts.push(async move {
                    let connected = timeout(limit, TcpStream::connect(addr)).await;
                    (position, addr, connected.unwrap_or_else(|_| timed_out()))
                });
            }
            let mut head_start = pin!(sleep(HEAD_START));
            loop {
                let ended = tokio::select! {
                    ended = attempts.next() => ended,
                    () = &mut head_start, if has_more => break,
                };
                match ended {
                    Some((position, addr, Ok(_))) => {
                        // The addresses before this one were tried earlier and have not answered.
                        self.set_failed(&all[..position], true);
                        self.set_failed(&[addr], false);
                        return Ok(());
                    }
                    Some((_, addr, Err(error))) => {
                        self.set_failed(&[addr], true);
                        failure = error;
                        if attempts.is_empty() {
                            break;
                        }
                    }
                    None => return Err(failure),
                }
            }
        }
    }

    fn set_failed(&self, addresses: &[SocketAddr], failed: bool) {
        self.known.send_modify(|known| {
            let tried = known.addresses.iter_mut().filter(|known| addresses.contains(&known.addr));
            tried.for_each(|address| address.failed = failed);
        });
    }
}

/// Puts the addresses that work before those that failed. Of those that work, the family that the
/// resolver prefers comes first, rotated by `rotation`.
fn order(addresses: &[Address], rotation: usize) -> Vec<SocketAddr> {
    let of = |failed| addresses.iter().filter(move |a| a.failed == failed).map(|a| a.addr);
    let prefers_ipv6 = of(false).next().is_some_and(|addr| addr.is_ipv6());
    let (mut ordered, others): (Vec<_>, Vec<_>) =
        of(false).partition(|addr| addr.is_ipv6() == prefers_ipv6);
    let count = ordered.len().max(1);
    ordered.rotate_left(rotation % count);
    ordered.extend(others);
    ordered.extend(of(true));
    ordered
}

/// Resolves the name repeatedly. Only one resolution runs at a time, regardless of its duration,
/// because each one occupies a thread.
async fn refresh(host: String, port: u16, known: Arc<watch::Sender<Known>>) {
    loop {
        let resolved = lookup_host((host.as_str(), port)).await;
        let resolved = resolved.and_then(|found| {
            let mut addresses: Vec<SocketAddr> = Vec::new();
            for addr in found {
                if addresses.len() < ADDRESSES_MAX && !addresses.contains(&addr) {
                    addresses.push(addr);
                }
            }
            let none = || io::Error::other("the name has no address");
            (!addresses.is_empty()).then_some(addresses).ok_or_else(none)
        });
        let pause = if resolved.is_ok() { REFRESH_INTERVAL } else { RETRY_INTERVAL };
        known.send_modify(|known| known.update(&host, resolved));
        sleep(pause).await;
    }
}

impl Known {
    fn update(&mut self, host: &str, resolved: io::Result<Vec<SocketAddr>>) {
        match resolved {
            Ok(found) => {
                let failed = |addr: &SocketAddr| {
                    self.addresses.iter().any(|known| known.addr == *addr && known.failed)
                };
                let found = found.into_iter();
                self.addresses =
                    found.map(|addr| Address { addr, failed: failed(&addr) }).collect();
                self.error = None;
            }
            Err(error) => {
                if self.error.is_none() && !self.addresses.is_empty() {
                    tracing::warn!(
                        host,
                        %error,
                        "cannot resolve the status API's name; lookups use the last known addresses"
                    );
                }
                self.error = Some(format!("cannot resolve {host}: {error}"));
            }
        }
    }
}

fn timed_out<T>() -> io::Result<T> {
    Err(io::ErrorKind::TimedOut.into())
}

#[cfg(test)]
impl Addresses {
    pub(super) fn fixed(addresses: &[SocketAddr]) -> Self {
        let addresses = addresses.iter().map(|addr| Address { addr: *addr, failed: false });
        let known = Known { addresses: addresses.collect(), error: None };
        Self::new(Arc::new(watch::Sender::new(known)), tokio::spawn(async {}))
    }
}

/// Returns an address that never answers a connection attempt: the backlog of its listener is full,
/// and nothing accepts.
#[cfg(test)]
pub(super) async fn hanging() -> (tokio::net::TcpListener, Vec<TcpStream>, SocketAddr) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind((std::net::Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let listener = socket.listen(0).unwrap();
    let addr = listener.local_addr().unwrap();
    let mut held = Vec::new();
    let brief = Duration::from_millis(100);
    while let Ok(Ok(stream)) = timeout(brief, TcpStream::connect(addr)).await {
        held.push(stream);
    }
    (listener, held, addr)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(3);

    /// Returns an address that accepts connections.
    fn listening() -> (std::net::TcpListener, SocketAddr) {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    // Field case 3.8.
    #[tokio::test]
    async fn an_address_that_hangs_does_not_delay_the_next_one() {
        let (_listener, _streams, hanging) = hanging().await;
        let (_working, working) = listening();
        let addresses = Addresses::fixed(&[hanging, working]);
        timeout(LIMIT / 2, addresses.connect_to_any(LIMIT)).await.unwrap().unwrap();
        timeout(LIMIT / 2, addresses.connect_to_any(LIMIT)).await.unwrap().unwrap();
        assert_eq!(addresses.ordered().await.unwrap(), [working, hanging]);
    }

    #[tokio::test]
    async fn an_address_that_works_again_is_used_again() {
        let (_first, first) = listening();
        let (_second, second) = listening();
        let addresses = Addresses::fixed(&[first, second]);
        addresses.set_failed(&[first, second], true);
        addresses.connect_to_any(LIMIT).await.unwrap();
        addresses.connect_to_any(LIMIT).await.unwrap();
        assert!(addresses.known.borrow().addresses.iter().all(|address| !address.failed));
    }

    #[tokio::test]
    async fn an_address_that_refuses_is_skipped() {
        let (listener, refusing) = listening();
        drop(listener);
        let (_listener, working) = listening();
        Addresses::fixed(&[refusing, working]).connect_to_any(LIMIT).await.unwrap();
        let error = Addresses::fixed(&[refusing]).connect_to_any(LIMIT).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    // Field case 5.4.
    #[tokio::test]
    async fn a_failing_name_server_does_not_remove_known_addresses() {
        let (_listener, working) = listening();
        let addresses = Addresses::fixed(&[working]);
        let fails = || Err(io::Error::other("no name server"));
        addresses.known.send_modify(|known| known.update("api", fails()));
        assert_eq!(addresses.ordered().await.unwrap(), [working]);
        addresses.known.send_modify(|known| known.addresses.clear());
        let error = addresses.ordered().await.unwrap_err();
        assert_eq!(error.to_string(), "cannot resolve api: no name server");
    }

    #[tokio::test]
    async fn a_name_is_resolved_in_the_background() {
        let (_listener, addr) = listening();
        let addresses = Addresses::resolve("localhost".to_owned(), addr.port());
        addresses.connect_to_any(LIMIT).await.unwrap();
        assert!(addresses.ordered().await.unwrap().contains(&addr));
    }

    #[test]
    fn connections_are_spread_over_the_preferred_family() {
        let at = |ip: IpAddr, failed| Address { addr: (ip, 80).into(), failed };
        let v4 = |n| IpAddr::from(Ipv4Addr::new(10, 0, 0, n));
        let v6 = |n| IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n));
        let all = [at(v6(1), true), at(v4(1), false), at(v6(2), false), at(v4(2), false)];
        let ips = |rotation| order(&all, rotation).iter().map(SocketAddr::ip).collect::<Vec<_>>();
        assert_eq!(ips(0), [v4(1), v4(2), v6(2), v6(1)]);
        assert_eq!(ips(1), [v4(2), v4(1), v6(2), v6(1)]);
        assert_eq!(ips(usize::MAX), ips(1));
        assert!(order(&[], 7).is_empty());
    }
}
