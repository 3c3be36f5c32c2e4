//! Notices queues that refuse everything.
//!
//! Decision: docs/decisions/0019-when-is-a-broker-session-useless.md

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lapin::types::ShortString;

/// How long a queue may refuse every message that a channel publishes to it before the session ends.
///
/// When the node of a quorum queue's leader dies, RabbitMQ refuses what comes by channels that have
/// published to that leader, until the node is back, although the queue has another leader within a second.
/// The channels of a new session publish to the new leader. A full queue refuses as well; a new session does
/// not help then, and is opened too rarely to do harm.
const PATIENCE: Duration = Duration::from_secs(3);

/// The queues of one session that refuse everything, by channel, each with the time of its first refusal
/// since it last confirmed a message.
#[derive(Default)]
pub(super) struct Refusals(HashMap<(usize, ShortString), Instant>);

impl Refusals {
    /// Notes that the queue took at least one message of a round on that channel, or none.
    pub(super) fn note(&mut self, channel: usize, queue: ShortString, takes: bool, now: Instant) {
        if takes {
            self.0.remove(&(channel, queue));
        } else {
            self.0.entry((channel, queue)).or_insert(now);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A queue that has refused everything for too long.
    pub(super) fn lasting(&self, now: Instant) -> Option<Refusal> {
        let is_lasting = |since: &Instant| now.saturating_duration_since(*since) >= PATIENCE;
        let lasting = self.0.iter().find(|(_, since)| is_lasting(since));
        lasting.map(|((_, queue), _)| Refusal { queue: queue.clone() })
    }
}

/// A queue that has refused every message of a session. It outlives that session: until the queue confirms a
/// message, the publisher reports that the broker takes none.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) queue: ShortString,
}

impl Refusal {
    /// Why there is no service, for an operator.
    pub(super) fn reason(&self) -> String {
        format!(
            "queue {} refuses every message: it is full, or the node of its leader is down; \
             publishing on a new connection",
            self.queue
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_queue_that_took_nothing_for_long_is_reported() {
        let (start, queue) = (Instant::now(), || ShortString::from("objects"));
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut refusals = Refusals::default();
        refusals.note(0, queue(), false, at(0));
        refusals.note(0, "objects.dead".into(), true, at(1_000));
        refusals.note(0, queue(), false, at(2_900));
        assert_eq!(refusals.lasting(at(2_999)), None);
        assert_eq!(refusals.lasting(at(3_000)), Some(Refusal { queue: queue() }));
        // Another channel may have found the new leader, which does not help this one.
        refusals.note(1, queue(), true, at(3_000));
        assert!(refusals.lasting(at(3_000)).is_some());
        refusals.note(0, queue(), true, at(3_100));
        assert!(refusals.is_empty() && refusals.lasting(at(60_000)).is_none());
        refusals.note(0, queue(), false, at(60_000));
        assert_eq!(refusals.lasting(at(60_001)), None);
    }
}
