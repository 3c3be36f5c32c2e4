//! Ports that stay free while nobody listens on them.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::eventually;

/// Outside of the range from which Linux takes the ports of outgoing connections.
const PORTS: Range<u16> = 20_000..32_000;

/// A free port on 127.0.0.1 that a test can rely on across restarts of its server.
///
/// It is outside of the range from which Linux takes the ports of outgoing connections (32768 and
/// above). A port out of that range, such as one got by binding to port 0, can be gone when the
/// server comes back, because some client's connection took it in the meantime. Nor does another test
/// of this process get the same one while nobody listens there yet, or just now.
///
/// # Panics
/// When a thousand ports in a row are taken.
#[must_use]
pub fn free_port() -> u16 {
    static TAKEN: LazyLock<AtomicUsize> =
        LazyLock::new(|| AtomicUsize::new(rand::random_range(0..PORTS.len())));
    let next = || TAKEN.fetch_add(1, Ordering::Relaxed) % PORTS.len();
    (0..1_000)
        .filter_map(|_| PORTS.clone().nth(next()))
        .find(|port| TcpListener::bind(local(*port)).is_ok())
        .expect("one port in 1,000 should be free")
}

pub(crate) fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Whether somebody listens on `port`.
pub(crate) fn is_open(port: u16) -> bool {
    TcpStream::connect_timeout(&local(port), Duration::from_secs(1)).is_ok()
}

pub(crate) async fn closed(port: u16) {
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
