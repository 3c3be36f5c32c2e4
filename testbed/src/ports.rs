//! Ports that stay free while nobody listens on them.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use crate::eventually;

/// A free port on 127.0.0.1 that a test can rely on across restarts of its server.
///
/// It is outside of the range from which Linux takes the ports of outgoing connections (32768 and
/// above). A port out of that range, such as one got by binding to port 0, can be gone when the
/// server comes back, because some client's connection took it in the meantime.
#[must_use]
pub fn free_port() -> u16 {
    (0..1_000)
        .map(|_| rand::random_range(20_000..32_000))
        .find(|port| TcpListener::bind(local(*port)).is_ok())
        .expect("one port in 12,000 should be free")
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
