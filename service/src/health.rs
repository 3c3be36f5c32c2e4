//! Readiness: which peers a service needs, and whether each is there.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Whether a peer is there: `Ok`, or why not, in words for an operator.
pub type PeerStatus = Result<(), String>;

/// The peers that a service needs in order to do its work.
///
/// The parts that talk to a peer own its status and change it; `/readyz` only looks.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<Vec<Peer>>>);

struct Peer {
    name: &'static str,
    status: watch::Receiver<PeerStatus>,
}

impl Health {
    /// From now on the service is ready only while `status` is `Ok`.
    pub fn needs(&self, name: &'static str, status: watch::Receiver<PeerStatus>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Peer { name, status });
    }

    /// Each peer that is away, with the reason.
    #[must_use]
    pub fn missing(&self) -> Vec<(&'static str, String)> {
        let peers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        peers
            .iter()
            .filter_map(|Peer { name, status }| {
                // The sender lives as long as the part that talks to the peer.
                if status.has_changed().is_err() {
                    return Some((*name, "the part that talks to it has stopped".to_owned()));
                }
                status.borrow().clone().err().map(|reason| (*name, reason))
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_missing_while_its_status_says_so_or_nobody_tells_it() {
        let health = Health::default();
        assert!(health.missing().is_empty());
        let (status, watched) = watch::channel(Err("refused".to_owned()));
        health.needs("broker", watched);
        assert_eq!(health.missing(), [("broker", "refused".to_owned())]);
        status.send(Ok(())).unwrap();
        assert!(health.missing().is_empty());
        drop(status);
        assert_eq!(health.missing().len(), 1);
    }
}
