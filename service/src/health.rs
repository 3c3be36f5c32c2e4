//! Readiness: which peers a service needs, and whether each is there.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Whether a peer is there: `Ok`, or why not, in words for an operator.
pub type PeerStatus = Result<(), String>;

/// The peers that a service needs in order to do its work.
///
/// The parts that talk to a peer own its status and change it; `/readyz` only looks.
#[derive(Clone, Default)]
pub struct Health {
    needs: Arc<Mutex<Needs>>,
    /// One for the whole process.
    draining: Arc<AtomicBool>,
}

#[derive(Default)]
struct Needs {
    peers: Vec<Peer>,
    wanted: Vec<Peer>,
    parts: Vec<Part>,
    complete: bool,
}

struct Peer {
    name: &'static str,
    status: watch::Receiver<PeerStatus>,
}

struct Part {
    name: &'static str,
    health: Health,
}

/// Something that is not there: whose name, or `None` for the needs that are still to be told, and
/// why.
type Gap = (Option<&'static str>, String);

impl Health {
    /// From now on the service is ready only while `status` is `Ok`.
    pub fn needs(&self, name: &'static str, status: watch::Receiver<PeerStatus>) {
        self.lock().peers.push(Peer { name, status });
    }

    /// The service is ready without this one too, but its page says when it is away.
    pub fn wants(&self, name: &'static str, status: watch::Receiver<PeerStatus>) {
        self.lock().wanted.push(Peer { name, status });
    }

    /// The health of one role of a process that has several: each tells its needs, and that these
    /// are all, to its own. The whole is ready only while each part is.
    #[must_use]
    pub fn part(&self, name: &'static str) -> Self {
        let health = Self { needs: Arc::default(), draining: Arc::clone(&self.draining) };
        self.lock().parts.push(Part { name, health: health.clone() });
        health
    }

    /// All needs and parts have been told; before that, the service counts as starting and is not
    /// ready.
    pub fn all_told(&self) {
        self.lock().complete = true;
    }

    /// The process stops: from now on it and each of its parts are not ready, so that balancers send
    /// their requests elsewhere.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether the process has begun to stop.
    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether new requests should be sent here.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.is_draining() && self.gaps().is_empty()
    }

    /// Each peer that is away, with the reason. For a peer of a part it is the part's name, and the
    /// reason begins with the peer's.
    #[must_use]
    pub fn missing(&self) -> Vec<(&'static str, String)> {
        let gaps = self.gaps().into_iter();
        gaps.map(|(name, reason)| (name.unwrap_or("service"), reason)).collect()
    }

    /// Each peer that is away and can be done without, with the reason.
    #[must_use]
    pub fn done_without(&self) -> Vec<(&'static str, String)> {
        let needs = self.lock();
        let own = needs.wanted.iter().filter_map(Peer::gap);
        let own = own.filter_map(|(name, reason)| Some((name?, reason)));
        let of_parts = needs.parts.iter().flat_map(|part| part.health.done_without());
        own.chain(of_parts).collect()
    }

    /// Each role and whether it is ready: those of the parts, or of a whole without parts the only one, which
    /// has its `name`.
    pub(crate) fn roles(&self, name: &'static str) -> Vec<(&'static str, bool)> {
        let is_ready = |health: &Self| health.gaps().is_empty();
        let needs = self.lock();
        if needs.parts.is_empty() {
            drop(needs);
            return vec![(name, is_ready(self))];
        }
        needs.parts.iter().map(|part| (part.name, is_ready(&part.health))).collect()
    }

    fn gaps(&self) -> Vec<Gap> {
        let needs = self.lock();
        let starting = (!needs.complete).then(|| (None, "starting".to_owned()));
        let away = needs.peers.iter().filter_map(Peer::gap);
        let of_parts = needs.parts.iter().flat_map(Part::gaps);
        starting.into_iter().chain(away).chain(of_parts).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Needs> {
        self.needs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peer {
    fn gap(&self) -> Option<Gap> {
        // The sender lives as long as the part that talks to the peer.
        let reason = match self.status.has_changed() {
            Err(_) => "the part that talks to it has stopped".to_owned(),
            Ok(_) => self.status.borrow().clone().err()?,
        };
        Some((Some(self.name), reason))
    }
}

impl Part {
    fn gaps(&self) -> impl Iterator<Item = Gap> {
        self.health.gaps().into_iter().map(|(peer, reason)| match peer {
            Some(peer) => (Some(self.name), format!("{peer}: {reason}")),
            None => (Some(self.name), reason),
        })
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

    #[test]
    fn the_whole_misses_what_a_part_misses_and_says_which_part_it_is() {
        let whole = Health::default();
        let (producer, consumer) = (whole.part("producer"), whole.part("consumer"));
        whole.all_told();
        producer.all_told();
        consumer.all_told();
        assert!(whole.missing().is_empty());
        let (status, watched) = watch::channel(Err("refused".to_owned()));
        consumer.needs("database", watched);
        assert_eq!(whole.missing(), [("consumer", "database: refused".to_owned())]);
        assert_eq!(consumer.missing(), [("database", "refused".to_owned())]);
        assert!(producer.missing().is_empty());
        status.send(Ok(())).unwrap();
        assert!(whole.missing().is_empty());
    }

    #[test]
    fn each_part_is_a_role_and_a_whole_without_parts_is_the_only_one() {
        let whole = Health::default();
        assert_eq!(whole.roles("lastseen"), [("lastseen", false)]);
        whole.all_told();
        assert_eq!(whole.roles("lastseen"), [("lastseen", true)]);
        let (producer, consumer) = (whole.part("producer"), whole.part("consumer"));
        producer.all_told();
        let roles = || whole.roles("lastseen");
        assert_eq!(roles(), [("producer", true), ("consumer", false)]);
        consumer.all_told();
        assert_eq!(roles(), [("producer", true), ("consumer", true)]);
    }

    #[test]
    fn a_process_that_stops_is_not_ready_nor_is_any_part_of_it() {
        let whole = Health::default();
        let part = whole.part("producer");
        whole.all_told();
        part.all_told();
        assert!(whole.is_ready() && part.is_ready());
        whole.drain();
        assert!(!whole.is_ready() && !part.is_ready());
    }

    #[test]
    fn what_is_only_wanted_is_told_and_not_missing() {
        let whole = Health::default();
        let producer = whole.part("producer");
        whole.all_told();
        producer.all_told();
        let (status, watched) = watch::channel(Err("refused".to_owned()));
        producer.wants("broker", watched);
        assert!(whole.missing().is_empty());
        assert_eq!(whole.done_without(), [("broker", "refused".to_owned())]);
        status.send(Ok(())).unwrap();
        assert!(whole.done_without().is_empty());
    }

    #[test]
    fn a_part_that_has_not_told_all_is_starting_and_so_is_a_whole_that_may_get_more_parts() {
        let whole = Health::default();
        let part = whole.part("consumer");
        let starting = |name| (name, "starting".to_owned());
        assert_eq!(whole.missing(), [starting("service"), starting("consumer")]);
        whole.all_told();
        assert_eq!(whole.missing(), [starting("consumer")]);
        part.all_told();
        assert!(whole.missing().is_empty());
    }
}
