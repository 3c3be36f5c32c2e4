//! Ports that stay free while no process listens on them.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::eventually;

/// The ports that [`free_port`] returns.
const PORTS: Range<u16> = 20_000..32_000;

/// Returns a free port on 127.0.0.1 that stays free while its server restarts.
///
/// The port is below the range from which Linux takes the ports of outgoing connections (32768 and
/// above). While the server is down, an outgoing connection could take a port of that range, which
/// includes the ports that binding to port 0 gives. Each call returns another port, so that no
/// other test of this process gets the same one.
pub fn free_port() -> u16 {
    static NEXT: LazyLock<AtomicUsize> =
        LazyLock::new(|| AtomicUsize::new(rand::random_range(0..PORTS.len())));
    let next = || NEXT.fetch_add(1, Ordering::Relaxed) % PORTS.len();
    (0..1_000)
        .filter_map(|_| PORTS.clone().nth(next()))
        .find(|port| TcpListener::bind(local(*port)).is_ok())
        .expect("one port in 1,000 should be free")
}

pub(crate) fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Whether a process listens on `port`.
pub(crate) fn is_open(port: u16) -> bool {
    TcpStream::connect_timeout(&local(port), Duration::from_secs(1)).is_ok()
}

/// Waits until no process listens on `port`.
pub(crate) async fn wait_until_closed(port: u16) {
    let what = format!("port {port} is closed");
    eventually(&what, Duration::from_secs(10), async || (!is_open(port)).then_some(())).await;
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn unused_port_is_not_returned_twice() {
        let ports: HashSet<u16> = (0..2_000).map(|_| free_port()).collect();
        assert_eq!(ports.len(), 2_000);
        assert!(ports.iter().all(|port| PORTS.contains(port)));
    }
}
