//! Finds all replicas behind one host name: the name may have an address for each replica, and one
//! connection reaches only one of them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use reqwest::Url;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// If the name server takes longer, the addresses of its latest answer are used.
const RESOLVE_TIMEOUT: Duration = Duration::from_millis(500);
/// Replicas above this number are not scraped.
const REPLICAS_MAX: usize = 100;

type Resolved = io::Result<Vec<SocketAddr>>;
/// Resolves a host and a port.
pub(super) type Resolver = fn(String, u16) -> Pin<Box<dyn Future<Output = Resolved> + Send>>;

/// The addresses of a URL's host, resolved again for each scrape.
pub(super) struct Replicas {
    host: String,
    port: u16,
    resolver: Resolver,
    /// The query that the name server has not answered yet. The next scrape waits for it instead of
    /// starting another: with a silent name server, queries would use up all blocking threads.
    pending: Option<JoinHandle<Resolved>>,
    /// The addresses in the name server's latest answer.
    latest: Vec<SocketAddr>,
}

/// The addresses by family, because one replica usually has an address of each family.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Addresses {
    /// The addresses to scrape: IPv4 if there are any.
    pub(super) preferred: Vec<SocketAddr>,
    /// The addresses to scrape if no preferred one answers.
    pub(super) others: Vec<SocketAddr>,
}

impl Replicas {
    pub(super) fn of(url: &Url, resolver: Resolver) -> Self {
        // An IPv6 address is in brackets in a URL.
        let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = url.port_or_known_default().unwrap_or(80);
        Self { host, port, resolver, pending: None, latest: Vec::new() }
    }

    /// # Errors
    /// When the name has never been resolved.
    pub(super) async fn addresses(&mut self) -> Result<Addresses, String> {
        let mut query = self
            .pending
            .take()
            .unwrap_or_else(|| tokio::spawn((self.resolver)(self.host.clone(), self.port)));
        let failure = match timeout(RESOLVE_TIMEOUT, &mut query).await {
            Ok(Ok(Ok(addresses))) => {
                self.latest = addresses;
                "the name has no address".to_owned()
            }
            Ok(Ok(Err(error))) => error.to_string(),
            Ok(Err(ended)) => ended.to_string(),
            Err(_) => {
                self.pending = Some(query);
                "the name server does not answer".to_owned()
            }
        };
        if self.latest.is_empty() {
            return Err(format!("cannot resolve the host name: {failure}"));
        }
        Ok(by_family(&self.latest))
    }
}

pub(super) fn resolve_by_system(
    host: String,
    port: u16,
) -> Pin<Box<dyn Future<Output = Resolved> + Send>> {
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
    fn replica_with_two_addresses_is_scraped_once() {
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
