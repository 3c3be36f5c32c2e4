//! The addresses of the status API's host.
//!
//! One task resolves the name every few seconds, so the number of new connections does not matter to the
//! name server, and keeps the last good answer while the name server fails. The probe of the API notes
//! which addresses refuse connections; lookups try those last.
//!
//! Decision: docs/decisions/0029-how-is-the-status-apis-name-resolved.md

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::net::{TcpStream, lookup_host};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

const REFRESH_INTERVAL: Duration = Duration::from_secs(5);
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// A name with more addresses than this is used with the first ones.
const ADDRESSES_MAX: usize = 16;
/// How long the probe waits for one address before it tries the next one at the same time.
const HEAD_START: Duration = Duration::from_millis(250);

/// What is known about the addresses. Clones share it.
#[derive(Clone)]
pub(super) struct Addresses {
    known: Arc<watch::Sender<Known>>,
    /// How many connections were asked for, and how many probes were made.
    connections: Arc<AtomicUsize>,
    probes: Arc<AtomicUsize>,
    _refresh: Arc<AbortOnDropHandle<()>>,
}

#[derive(Default)]
struct Known {
    /// Of the last resolution that succeeded, in the resolver's order.
    addresses: Vec<Address>,
    /// Why the last resolution failed, if it did.
    error: Option<String>,
}

#[derive(Clone, Copy)]
struct Address {
    addr: SocketAddr,
    /// Whether the last probe could not connect to it.
    failed: bool,
}

impl Addresses {
    /// Starts to resolve `host`.
    pub(super) fn of(host: String, port: u16) -> Self {
        let known = Arc::new(watch::Sender::new(Known::default()));
        let refresh = tokio::spawn(refresh(host, port, Arc::clone(&known)));
        let refresh = Arc::new(AbortOnDropHandle::new(refresh));
        Self { known, connections: Arc::default(), probes: Arc::default(), _refresh: refresh }
    }

    /// The addresses in the order in which to try them. Waits until the name was resolved once.
    ///
    /// # Errors
    /// Why the name has never been resolved.
    async fn ordered(&self) -> io::Result<Vec<SocketAddr>> {
        let mut known = self.known.subscribe();
        // This function holds the sender.
        let is_settled = |known: &Known| !known.addresses.is_empty() || known.error.is_some();
        let known = known.wait_for(is_settled).await.map_err(io::Error::other)?;
        if let (true, Some(error)) = (known.addresses.is_empty(), &known.error) {
            return Err(io::Error::other(error.clone()));
        }
        Ok(order(&known.addresses, self.connections.fetch_add(1, Ordering::Relaxed)))
    }

    /// Connects to one of the addresses: first to one of them, after a head start to the next one as well,
    /// and so on. Each call begins with another address, so each is tried again and again.
    ///
    /// # Errors
    /// Why the last of them refused, or that none answered within `limit`.
    pub(super) async fn race(&self, limit: Duration) -> io::Result<()> {
        let mut all = timeout(limit, self.ordered()).await.unwrap_or_else(|_| timed_out())?;
        all.sort_unstable();
        let first = self.probes.fetch_add(1, Ordering::Relaxed) % all.len().max(1);
        all.rotate_left(first);
        let mut attempts = FuturesUnordered::new();
        let mut waiting = all.iter().copied().enumerate();
        let mut failure = io::Error::from(io::ErrorKind::TimedOut);
        loop {
            let begun = waiting.next();
            let more = waiting.len() > 0;
            if let Some((place, addr)) = begun {
                attempts.push(async move {
                    let connected = timeout(limit, TcpStream::connect(addr)).await;
                    (place, addr, connected.unwrap_or_else(|_| timed_out()))
                });
            }
            let mut head_start = pin!(sleep(HEAD_START));
            loop {
                let ended = tokio::select! {
                    ended = attempts.next() => ended,
                    () = &mut head_start, if more => break,
                };
                match ended {
                    Some((place, addr, Ok(_))) => {
                        // Those that were tried earlier have not answered.
                        self.note(&all[..place], true);
                        self.note(&[addr], false);
                        return Ok(());
                    }
                    Some((_, addr, Err(error))) => {
                        self.note(&[addr], true);
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

    fn note(&self, addresses: &[SocketAddr], failed: bool) {
        self.known.send_modify(|known| {
            let noted = known.addresses.iter_mut().filter(|known| addresses.contains(&known.addr));
            noted.for_each(|address| address.failed = failed);
        });
    }
}

impl Resolve for Addresses {
    fn resolve(&self, _: Name) -> Resolving {
        // The client asks for the status API's host only: it follows no redirect and uses no proxy.
        let addresses = self.clone();
        Box::pin(async move {
            let addresses: Addrs = Box::new(addresses.ordered().await?.into_iter());
            Ok(addresses)
        })
    }
}

/// Those that work first, each in turn, but only those of the family that the resolver prefers; the client
/// tries the other family at the same time, a little later.
fn order(addresses: &[Address], turn: usize) -> Vec<SocketAddr> {
    let of = |failed| addresses.iter().filter(move |a| a.failed == failed).map(|a| a.addr);
    let prefers_ipv6 = of(false).next().is_some_and(|addr| addr.is_ipv6());
    let (mut ordered, others): (Vec<_>, Vec<_>) =
        of(false).partition(|addr| addr.is_ipv6() == prefers_ipv6);
    let places = ordered.len().max(1);
    ordered.rotate_left(turn % places);
    ordered.extend(others);
    ordered.extend(of(true));
    ordered
}

/// Resolves the name again and again. Only one resolution runs at a time, however long it takes: each
/// occupies a thread.
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
        let refresh = AbortOnDropHandle::new(tokio::spawn(async {}));
        Self {
            known: Arc::new(watch::Sender::new(known)),
            connections: Arc::default(),
            probes: Arc::default(),
            _refresh: Arc::new(refresh),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(3);

    /// Accepts connections.
    fn listening() -> (std::net::TcpListener, SocketAddr) {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    /// Answers no attempt to connect: its backlog is full and nobody accepts.
    async fn black_hole() -> (tokio::net::TcpListener, Vec<TcpStream>, SocketAddr) {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let listener = socket.listen(0).unwrap();
        let addr = listener.local_addr().unwrap();
        let mut held = Vec::new();
        let brief = Duration::from_millis(100);
        while let Ok(Ok(stream)) = timeout(brief, TcpStream::connect(addr)).await {
            held.push(stream);
        }
        (listener, held, addr)
    }

    // Field case 3.8.
    #[tokio::test]
    async fn a_black_hole_does_not_hold_up_the_next_address() {
        let (_hole, _held, hole) = black_hole().await;
        let (_listener, working) = listening();
        let addresses = Addresses::fixed(&[hole, working]);
        timeout(LIMIT / 2, addresses.race(LIMIT)).await.unwrap().unwrap();
        timeout(LIMIT / 2, addresses.race(LIMIT)).await.unwrap().unwrap();
        assert_eq!(addresses.ordered().await.unwrap(), [working, hole]);
    }

    #[tokio::test]
    async fn an_address_that_works_again_is_used_again() {
        let (_first, first) = listening();
        let (_second, second) = listening();
        let addresses = Addresses::fixed(&[first, second]);
        addresses.note(&[first, second], true);
        addresses.race(LIMIT).await.unwrap();
        addresses.race(LIMIT).await.unwrap();
        assert!(addresses.known.borrow().addresses.iter().all(|address| !address.failed));
    }

    #[tokio::test]
    async fn an_address_that_refuses_is_passed_at_once_and_reported() {
        let (listener, refusing) = listening();
        drop(listener);
        let (_listener, working) = listening();
        Addresses::fixed(&[refusing, working]).race(LIMIT).await.unwrap();
        let error = Addresses::fixed(&[refusing]).race(LIMIT).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }

    // Field case 5.4.
    #[tokio::test]
    async fn the_last_good_answer_outlives_a_failing_name_server() {
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
        let addresses = Addresses::of("localhost".to_owned(), addr.port());
        addresses.race(LIMIT).await.unwrap();
        assert!(addresses.ordered().await.unwrap().contains(&addr));
    }

    #[test]
    fn connections_are_spread_over_the_preferred_family() {
        let at = |ip: IpAddr, failed| Address { addr: (ip, 80).into(), failed };
        let v4 = |n| IpAddr::from(Ipv4Addr::new(10, 0, 0, n));
        let v6 = |n| IpAddr::from(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n));
        let all = [at(v6(1), true), at(v4(1), false), at(v6(2), false), at(v4(2), false)];
        let ips = |turn| order(&all, turn).iter().map(SocketAddr::ip).collect::<Vec<_>>();
        assert_eq!(ips(0), [v4(1), v4(2), v6(2), v6(1)]);
        assert_eq!(ips(1), [v4(2), v4(1), v6(2), v6(1)]);
        assert_eq!(ips(usize::MAX), ips(1));
        assert!(order(&[], 7).is_empty());
    }
}
