//! Listening sockets.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::io::Errno;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket};

/// How many connections may wait to be accepted; the kernel may allow fewer (`net.core.somaxconn`).
const BACKLOG: u32 = 4_096;

/// Listens on `address`. The unspecified IPv6 address `[::]` (`:9090` in a setting) also accepts
/// IPv4 connections, regardless of the machine's `net.ipv6.bindv6only`. On a machine without IPv6,
/// the server listens on `0.0.0.0` instead.
///
/// # Errors
/// When the address is in use, or does not belong to this machine.
///
/// # Panics
/// Outside a tokio runtime.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    bind(address).or_else(|error| {
        if address.ip() == Ipv6Addr::UNSPECIFIED && is_without_ipv6(&error) {
            return bind((Ipv4Addr::UNSPECIFIED, address.port()).into());
        }
        Err(error)
    })
}

/// The address by which a process on this machine reaches a server that listens on `ip`.
#[must_use]
pub fn reachable_ip(ip: IpAddr) -> IpAddr {
    // `[::]` accepts IPv4 too.
    if ip.is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { ip }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if address.ip() == Ipv6Addr::UNSPECIFIED {
        SockRef::from(&socket).set_only_v6(false)?;
    }
    // Otherwise `bind` fails while connections of the previous process are still closing.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn is_without_ipv6(error: &io::Error) -> bool {
    let errors = [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL, Errno::PROTONOSUPPORT];
    Errno::from_io_error(error).is_some_and(|error| errors.contains(&error))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;

    async fn is_reachable(host: &str, port: u16) -> bool {
        TcpStream::connect((host, port)).await.is_ok()
    }

    // Field case 1.9
    #[tokio::test]
    async fn unspecified_ipv6_address_accepts_ipv4_and_ipv6() {
        let listener = listen("[::]:0".parse().unwrap()).unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(is_reachable("127.0.0.1", port).await);
        // On a machine without IPv6, the listener accepts only IPv4.
        let has_ipv6 = std::net::TcpListener::bind("[::1]:0").is_ok();
        assert_eq!(is_reachable("::1", port).await, has_ipv6);
    }

    #[tokio::test]
    async fn ipv4_address_accepts_ipv4_only() {
        for address in ["0.0.0.0:0", "127.0.0.1:0"] {
            let listener = listen(address.parse().unwrap()).unwrap();
            let port = listener.local_addr().unwrap().port();
            assert!(is_reachable("127.0.0.1", port).await);
            assert!(!is_reachable("::1", port).await);
        }
    }
}
