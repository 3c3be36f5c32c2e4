//! A proxy that simulates network failures.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use url::Url;

use crate::free_port;
use crate::ports::local;

/// A TCP proxy in front of one or more servers. It can silence, slow down or cut its connections.
/// With several servers, it is a load balancer that does not check their health.
///
/// The proxy stops on drop, or with the runtime in which it was started.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    network: watch::Sender<Network>,
    /// The targets of new connections.
    targets: Arc<Mutex<Vec<String>>>,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    accepted: AtomicU64,
    held: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Traffic {
    Flows,
    Silent,
    Refused,
}

#[derive(Clone, Debug)]
struct Lag {
    delay: Range<Duration>,
    stall: Duration,
}

#[derive(Clone, Debug)]
struct Network {
    traffic: Traffic,
    lag: Option<Lag>,
    /// The number of cuts. A connection ends when this number changes. If connections watched
    /// `traffic` instead, they would miss a cut that is restored at once.
    cuts: u64,
}

impl Proxy {
    /// Starts to forward to `target`, such as `127.0.0.1:5672`, which may start later.
    pub async fn start(target: impl Into<String>) -> Self {
        Self::balance(vec![target.into()]).await
    }

    /// Starts to pass each connection to the next of `targets`. If a target refuses the connection,
    /// the proxy tries the one after it. The targets may start later.
    pub async fn balance(targets: Vec<String>) -> Self {
        let listener =
            TcpListener::bind(local(free_port())).await.expect("a free port can be listened on");
        let address = listener.local_addr().expect("a listener has an address");
        let (network, watched) =
            watch::channel(Network { traffic: Traffic::Flows, cuts: 0, lag: None });
        let counts = Arc::default();
        let targets = Arc::new(Mutex::new(targets));
        tokio::spawn(accept(listener, Arc::clone(&targets), watched, Arc::clone(&counts)));
        Self { address, network, targets, counts }
    }

    /// Starts to forward to the server that `url` names. Returns also `url` with the address of the
    /// proxy.
    pub async fn before(url: &str) -> (Self, String) {
        let mut url = Url::parse(url).expect("a server's URL should be a URL");
        let default_port = if url.scheme() == "amqp" { 5672 } else { 5432 };
        let host = url.host_str().expect("a server's URL should have a host");
        let proxy = Self::start(format!("{host}:{}", url.port().unwrap_or(default_port))).await;
        url.set_ip_host(proxy.addr().ip()).expect("a server's URL has a host");
        url.set_port(Some(proxy.addr().port())).expect("a server's URL has a port");
        (proxy, url.into())
    }

    /// The address to connect to instead of the target.
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// Forwards new connections to another target, like a load balancer whose backend has failed.
    /// Open connections keep their target.
    pub fn switch_to(&self, target: impl Into<String>) {
        *self.targets.lock() = vec![target.into()];
    }

    /// The number of connections that clients have opened so far, including refused ones.
    pub fn accepted(&self) -> u64 {
        self.counts.accepted.load(Ordering::Relaxed)
    }

    /// The number of reads whose bytes the proxy has held back so far because it was silent.
    pub fn held(&self) -> u64 {
        self.counts.held.load(Ordering::Relaxed)
    }

    /// Stops forwarding in both directions. Connections stay open, and new ones are accepted. The
    /// bytes sent meanwhile arrive after [`Proxy::restore`], as after an outage that TCP survived.
    pub fn silence(&self) {
        self.network.send_modify(|network| network.traffic = Traffic::Silent);
    }

    /// Closes all connections, and each new one as soon as it is accepted.
    pub fn cut(&self) {
        self.network.send_modify(|network| {
            network.traffic = Traffic::Refused;
            network.cuts += 1;
        });
    }

    /// Delays the bytes of each read by a random time in the range `delay`, and those of about one
    /// read in a hundred also by `stall`, like TCP after a lost packet. The order stays the same.
    pub fn slow_down(&self, delay: Range<Duration>, stall: Duration) {
        self.network.send_modify(|network| network.lag = Some(Lag { delay, stall }));
    }

    /// Forwards without delay again, on new connections and on those that were silent or slow.
    pub fn restore(&self) {
        self.network.send_modify(|network| {
            network.traffic = Traffic::Flows;
            network.lag = None;
        });
    }
}

async fn accept(
    listener: TcpListener,
    targets: Arc<Mutex<Vec<String>>>,
    mut network: watch::Receiver<Network>,
    counts: Arc<Counts>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // An error means that the proxy was dropped.
            changed = network.changed() => if changed.is_ok() { continue } else { return },
        };
        let (client, _) = accepted.expect("a test has few connections");
        counts.accepted.fetch_add(1, Ordering::Relaxed);
        let current = network.borrow().clone();
        if current.traffic == Traffic::Refused {
            continue;
        }
        let targets = {
            let mut targets = targets.lock();
            targets.rotate_left(1);
            targets.clone()
        };
        let (mut cut, network) = (network.clone(), network.clone());
        let counts = Arc::clone(&counts);
        tokio::spawn(async move {
            tokio::select! {
                _ = cut.wait_for(|network| network.cuts != current.cuts) => {}
                // An error ends only this connection.
                _ = forward_both_ways(client, &targets, network, &counts.held) => {}
            }
        });
    }
}

/// Forwards bytes both ways until both sides have closed or one has failed.
async fn forward_both_ways(
    mut client: TcpStream,
    targets: &[String],
    network: watch::Receiver<Network>,
    held: &AtomicU64,
) -> io::Result<()> {
    wait_until_flowing(&network).await?;
    let mut server = connect_to_any(targets).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    tokio::try_join!(
        forward(from_client, to_server, &network, held),
        forward(from_server, to_client, &network, held)
    )?;
    Ok(())
}

async fn connect_to_any(targets: &[String]) -> io::Result<TcpStream> {
    let mut last_error = io::ErrorKind::NotFound.into();
    for target in targets {
        match TcpStream::connect(target).await {
            Ok(server) => return Ok(server),
            Err(error) => last_error = error,
        }
    }
    Err(last_error)
}

async fn forward(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    network: &watch::Receiver<Network>,
    held: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = from.read(&mut buffer).await?;
        if network.borrow().traffic == Traffic::Silent {
            held.fetch_add(1, Ordering::Relaxed);
        }
        wait_until_flowing(network).await?;
        let lag = network.borrow().lag.clone();
        if let Some(lag) = lag {
            tokio::time::sleep(lag.random_delay()).await;
        }
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
    }
}

impl Lag {
    fn random_delay(&self) -> Duration {
        let delay = rand::random_range(self.delay.clone());
        if rand::random_ratio(1, 100) { delay + self.stall } else { delay }
    }
}

async fn wait_until_flowing(network: &watch::Receiver<Network>) -> io::Result<()> {
    let mut network = network.clone();
    let flows = network.wait_for(|network| network.traffic == Traffic::Flows).await;
    flows.map(drop).map_err(|_| io::ErrorKind::ConnectionAborted.into())
}
