//! Readiness: which peers a service needs, and whether each is there.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Whether a peer is there: `Ok`, or why not, in words for an operator.
pub type PeerStatus = Result<(), String>;

/// The peers that a service needs in order to do its work.
///
/// The parts that talk to a peer own its status and change it; `/readyz` only looks.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<Needs>>);

#[derive(Default)]
struct Needs {
    peers: Vec<Peer>,
    complete: bool,
}

struct Peer {
    name: &'static str,
    status: watch::Receiver<PeerStatus>,
}

impl Health {
    /// From now on the service is ready only while `status` is `Ok`.
    pub fn needs(&self, name: &'static str, status: watch::Receiver<PeerStatus>) {
        self.lock().peers.push(Peer { name, status });
    }

    /// All needs have been told; before that, the service counts as starting and is not ready.
    pub fn all_told(&self) {
        self.lock().complete = true;
    }

    /// Each peer that is away, with the reason.
    #[must_use]
    pub fn missing(&self) -> Vec<(&'static str, String)> {
        let needs = self.lock();
        let starting = (!needs.complete).then(|| ("service", "starting".to_owned()));
        let away = needs.peers.iter().filter_map(|Peer { name, status }| {
            // The sender lives as long as the part that talks to the peer.
            if status.has_changed().is_err() {
                return Some((*name, "the part that talks to it has stopped".to_owned()));
            }
            status.borrow().clone().err().map(|reason| (*name, reason))
        });
        starting.into_iter().chain(away).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Needs> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_missing_while_its_status_says_so_or_nobody_tells_it() {
        let health = Health::default();
        assert_eq!(health.missing(), [("service", "starting".to_owned())]);
        health.all_told();
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
