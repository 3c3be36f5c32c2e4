//! All processes behind one name: a name may have an address for each replica, and one connection reaches only one of
//! them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use reqwest::Url;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// A name server that takes longer is not waited for: the addresses of the last answer are used.
const PATIENCE: Duration = Duration::from_millis(500);
/// More replicas are not asked.
const REPLICAS_MAX: usize = 100;

type Answer = io::Result<Vec<SocketAddr>>;
/// Looks up a host and a port.
pub(super) type Lookup = fn(String, u16) -> Pin<Box<dyn Future<Output = Answer> + Send>>;

/// The addresses of a URL's host, looked up anew for each round.
pub(super) struct Replicas {
    host: String,
    port: u16,
    lookup: Lookup,
    /// One that has not been answered. There is never a second one, or a silent name server would use up the threads.
    running: Option<JoinHandle<Answer>>,
    latest: Vec<SocketAddr>,
}

/// The addresses of one family each, since a replica usually has one of both.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    /// Those to ask: of IPv4 if there are any.
    pub(super) preferred: Vec<SocketAddr>,
    /// Those to ask if none of the others answers.
    pub(super) others: Vec<SocketAddr>,
}

impl Replicas {
    pub(super) fn of(url: &Url, lookup: Lookup) -> Self {
        // An IPv6 address is in brackets in a URL.
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = url.port_or_known_default().unwrap_or(80);
        Self { host, port, lookup, running: None, latest: Vec::new() }
    }

    /// # Errors
    /// When the name has never been resolved.
    pub(super) async fn addresses(&mut self) -> Result<Addresses, String> {
        let mut running = self
            .running
            .take()
            .unwrap_or_else(|| tokio::spawn((self.lookup)(self.host.clone(), self.port)));
        let failure = match timeout(PATIENCE, &mut running).await {
            Ok(Ok(Ok(addresses))) => {
                self.latest = addresses;
                "it has no address".to_owned()
            }
            Ok(Ok(Err(error))) => error.to_string(),
            Ok(Err(ended)) => ended.to_string(),
            Err(_) => {
                self.running = Some(running);
                "the name server does not answer".to_owned()
            }
        };
        if self.latest.is_empty() {
            return Err(format!("the name cannot be resolved: {failure}"));
        }
        Ok(by_family(&self.latest))
    }
}

pub(super) fn system_lookup(
    host: String,
    port: u16,
) -> Pin<Box<dyn Future<Output = Answer> + Send>> {
    Box::pin(async move { Ok(tokio::net::lookup_host((host, port)).await?.collect()) })
}

fn by_family(addresses: &[SocketAddr]) -> Addresses {
    let mut addresses = addresses.to_vec();
    addresses.sort_unstable();
    addresses.dedup();
    let (mut v4, mut v6): (Vec<_>, Vec<_>) = addresses.into_iter().partition(SocketAddr::is_ipv4);
    v4.truncate(REPLICAS_MAX);
    v6.truncate(REPLICAS_MAX);
    if v4.is_empty() {
        return Addresses { preferred: v6, others: v4 };
    }
    Addresses { preferred: v4, others: v6 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_with_two_addresses_is_asked_by_one() {
        let of = |addresses: &[&str]| {
            let parsed: Vec<_> = addresses.iter().map(|address| address.parse().unwrap()).collect();
            let Addresses { preferred, others } = by_family(&parsed);
            (preferred.len(), others.len())
        };
        assert_eq!(of(&["[::1]:9091", "127.0.0.1:9091", "127.0.0.1:9091"]), (1, 1));
        assert_eq!(of(&["10.0.0.1:1", "10.0.0.2:1", "[fd00::1]:1", "[fd00::2]:1"]), (2, 2));
        assert_eq!(of(&["[fd00::1]:1", "[fd00::2]:1"]), (2, 0));
    }
}
