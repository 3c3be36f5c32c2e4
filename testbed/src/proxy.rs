//! A network that fails.

use std::io;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::free_port;
use crate::ports::local;

/// A TCP proxy in front of a server, whose connections can go silent or be cut.
///
/// It stops on drop, or with the runtime that it was started in.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    network: watch::Sender<Network>,
    /// Where new connections go to.
    target: Arc<Mutex<String>>,
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
    /// How often it was cut. A connection ends when this is no longer what it was at its start;
    /// looking at `traffic` it would miss a cut that is restored at once.
    cuts: u64,
}

impl Proxy {
    /// Starts to forward to `target`, such as `127.0.0.1:5672`; nobody has to be there yet.
    pub async fn start(target: impl Into<String>) -> Self {
        let listener =
            TcpListener::bind(local(free_port())).await.expect("a free port can be listened on");
        let address = listener.local_addr().expect("a listener has an address");
        let (network, watched) =
            watch::channel(Network { traffic: Traffic::Flows, cuts: 0, lag: None });
        let counts = Arc::default();
        let target = Arc::new(Mutex::new(target.into()));
        tokio::spawn(accept(listener, Arc::clone(&target), watched, Arc::clone(&counts)));
        Self { address, network, target, counts }
    }

    /// Where to connect to instead of the target.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }

    /// Sends new connections to another target, as a load balancer does whose backend has failed. Those
    /// that are open stay as they are.
    pub fn switch_to(&self, target: impl Into<String>) {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner) = target.into();
    }

    /// How many connections were made to it so far, also while it refused them.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.counts.accepted.load(Ordering::Relaxed)
    }

    /// How many pieces of what was sent it has held back so far, because it was silent.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.counts.held.load(Ordering::Relaxed)
    }

    /// From now on nothing is forwarded, in either direction. Connections stay open, and new ones
    /// are accepted, and get nothing. What is sent meanwhile arrives once it is restored, as after an
    /// outage that TCP outlived.
    pub fn silence(&self) {
        self.network.send_modify(|network| network.traffic = Traffic::Silent);
    }

    /// Closes all connections, and from now on each new one as soon as it is accepted.
    pub fn cut(&self) {
        self.network.send_modify(|network| {
            network.traffic = Traffic::Refused;
            network.cuts += 1;
        });
    }

    /// From now on each piece of what is forwarded is held up: for a random time out of `delay`, and
    /// every hundredth, or so, for `stall` on top, which is what TCP makes of a lost packet. The order stays.
    pub fn slow_down(&self, delay: Range<Duration>, stall: Duration) {
        self.network.send_modify(|network| network.lag = Some(Lag { delay, stall }));
    }

    /// Forwards again, and at once: new connections, and those that were only silent or slow.
    pub fn restore(&self) {
        self.network.send_modify(|network| {
            network.traffic = Traffic::Flows;
            network.lag = None;
        });
    }
}

async fn accept(
    listener: TcpListener,
    target: Arc<Mutex<String>>,
    mut network: watch::Receiver<Network>,
    counts: Arc<Counts>,
) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // An error says that the proxy has been dropped.
            changed = network.changed() => if changed.is_ok() { continue } else { return },
        };
        let (client, _) = accepted.expect("a test has few connections");
        counts.accepted.fetch_add(1, Ordering::Relaxed);
        let now = network.borrow().clone();
        if now.traffic == Traffic::Refused {
            continue;
        }
        let target = target.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (mut cut, network) = (network.clone(), network.clone());
        let counts = Arc::clone(&counts);
        tokio::spawn(async move {
            tokio::select! {
                _ = cut.wait_for(|network| network.cuts != now.cuts) => {}
                // An error ends the connection, and there is nobody else to tell.
                _ = carry(client, &target, network, &counts.held) => {}
            }
        });
    }
}

/// Carries bytes both ways until both sides have closed, or one has failed.
async fn carry(
    mut client: TcpStream,
    target: &str,
    network: watch::Receiver<Network>,
    held: &AtomicU64,
) -> io::Result<()> {
    flowing(&network).await?;
    let mut server = TcpStream::connect(target).await?;
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
        flowing(network).await?;
        let lag = network.borrow().lag.clone();
        if let Some(lag) = lag {
            tokio::time::sleep(lag.time()).await;
        }
        if length == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..length]).await?;
    }
}

impl Lag {
    fn time(&self) -> Duration {
        let delay = rand::random_range(self.delay.clone());
        if rand::random_ratio(1, 100) { delay + self.stall } else { delay }
    }
}

async fn flowing(network: &watch::Receiver<Network>) -> io::Result<()> {
    let mut network = network.clone();
    let flows = network.wait_for(|network| network.traffic == Traffic::Flows).await;
    flows.map(drop).map_err(|_| io::ErrorKind::ConnectionAborted.into())
}
