//! Detects queues that refuse all messages.
//!
//! Decision: docs/decisions/0019-when-is-a-broker-session-useless.md

use std::collections::HashMap;
use std::time::{Duration, Instant};

use lapin::types::ShortString;

/// How long a queue may refuse every message that a channel publishes to it before the session
/// ends.
///
/// When the node of a quorum queue's leader dies, RabbitMQ refuses the messages of channels that
/// have published to that leader until the node is back, although the queue has a new leader within
/// a second. The channels of a new session publish to the new leader. For a full queue, a new
/// session does not help, but it does no harm at this rate.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(3);

/// The queues that refuse all messages of a channel, for each channel of a session. The time is
/// that of the first refusal since the queue last confirmed a message of the channel.
#[derive(Default)]
pub(super) struct Refusals(HashMap<(usize, ShortString), Instant>);

impl Refusals {
    /// Records whether the queue accepted at least one message of a round on this channel.
    pub(super) fn record(
        &mut self,
        channel: usize,
        queue: ShortString,
        has_accepted: bool,
        now: Instant,
    ) {
        if has_accepted {
            self.0.remove(&(channel, queue));
        } else {
            self.0.entry((channel, queue)).or_insert(now);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns a queue that has refused all messages for too long.
    pub(super) fn lasting(&self, now: Instant) -> Option<Refusal> {
        let is_lasting = |since: &Instant| now.saturating_duration_since(*since) >= REFUSAL_TIMEOUT;
        let lasting = self.0.iter().find(|(_, since)| is_lasting(since));
        lasting.map(|((_, queue), _)| Refusal { queue: queue.clone() })
    }
}

/// A queue that has refused every message of a session. The publisher keeps this after the session
/// and reports it until the queue confirms a message.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) queue: ShortString,
}

impl Refusal {
    /// The reason for the status, worded for an operator.
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
    fn queue_that_refuses_all_for_long_is_reported() {
        let (start, queue) = (Instant::now(), || ShortString::from("objects"));
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut refusals = Refusals::default();
        refusals.record(0, queue(), false, at(0));
        refusals.record(0, "objects.dead".into(), true, at(1_000));
        refusals.record(0, queue(), false, at(2_900));
        assert_eq!(refusals.lasting(at(2_999)), None);
        assert_eq!(refusals.lasting(at(3_000)), Some(Refusal { queue: queue() }));
        // A confirm on another channel does not count: this channel may still use the old leader.
        refusals.record(1, queue(), true, at(3_000));
        assert!(refusals.lasting(at(3_000)).is_some());
        refusals.record(0, queue(), true, at(3_100));
        assert!(refusals.is_empty() && refusals.lasting(at(60_000)).is_none());
        refusals.record(0, queue(), false, at(60_000));
        assert_eq!(refusals.lasting(at(60_001)), None);
    }
}
