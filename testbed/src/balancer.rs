//! A TCP load balancer in front of several producers.

use std::net::SocketAddr;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::free_port;
use crate::ports::local;

/// A plain TCP balancer. It passes each connection to the next backend, or to the one after if that
/// one refuses it. It does not parse HTTP, check health or retry. It stops on drop.
#[derive(Debug)]
pub struct Balancer {
    address: SocketAddr,
    _accepting: JoinSet<()>,
}

impl Balancer {
    /// Starts to balance over `backends`, which may start later.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn start(backends: Vec<SocketAddr>) -> Self {
        let listener =
            TcpListener::bind(local(free_port())).await.expect("a free port can be listened on");
        let address = listener.local_addr().expect("a listener has an address");
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, backends));
        Self { address, _accepting: accepting }
    }

    /// The address to connect to instead of the backends.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.address
    }
}

async fn accept(listener: TcpListener, mut backends: Vec<SocketAddr>) {
    let mut connections = JoinSet::new();
    loop {
        let (mut client, _) = listener.accept().await.expect("a test has few connections");
        backends.rotate_left(1);
        let backends = backends.clone();
        connections.spawn(async move {
            for backend in backends {
                if let Ok(mut server) = TcpStream::connect(backend).await {
                    // When one side closes the connection, the other side is closed as well.
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                    return;
                }
            }
        });
        while connections.try_join_next().is_some() {}
    }
}
