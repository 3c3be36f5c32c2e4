//! The acks of one session: those of a prefix of its deliveries share one frame.
//!
//! Decision: docs/decisions/0034-how-are-acks-batched.md

use std::collections::BTreeSet;

use futures_util::future::join_all;
use lapin::Acker;
use lapin::options::BasicAckOptions;
use tokio::sync::{mpsc, oneshot};

/// The most that are sent before the first of them is told.
const TOGETHER: usize = 1_000;

/// Sends acks until it is dropped.
pub(super) struct Acks {
    /// Unbounded, because there are no more than unsettled deliveries.
    wanted: mpsc::UnboundedSender<Wanted>,
}

struct Wanted {
    tag: u64,
    acker: Acker,
    sent: oneshot::Sender<bool>,
}

impl Acks {
    /// For the deliveries of a channel that has delivered nothing yet.
    pub(super) fn start() -> Self {
        let (wanted, incoming) = mpsc::unbounded_channel();
        tokio::spawn(send(incoming));
        Self { wanted }
    }

    /// Whether nothing can be acked any more.
    pub(super) fn have_died(&self) -> bool {
        self.wanted.is_closed()
    }

    /// Whether the ack of that delivery is sent.
    pub(super) async fn send(&self, tag: u64, acker: Acker) -> bool {
        let (sent, answer) = oneshot::channel();
        let handed_over = self.wanted.send(Wanted { tag, acker, sent });
        handed_over.is_ok() && answer.await.unwrap_or(false)
    }
}

/// While some acks are written, the next ones gather: under load most of them are of a prefix, for the
/// results of a batch are committed together.
async fn send(mut incoming: mpsc::UnboundedReceiver<Wanted>) {
    let mut acked = Acked::default();
    let mut wanted = Vec::new();
    while incoming.recv_many(&mut wanted, TOGETHER).await > 0 {
        wanted.sort_unstable_by_key(|wanted| wanted.tag);
        acked.extend(wanted.iter().map(|wanted| wanted.tag));
        let mut singles =
            wanted.split_off(wanted.partition_point(|wanted| acked.has_all_to(wanted.tag)));
        let prefix = async {
            // The last of these, and not the end of the prefix: a tag that was acked before is unknown
            // to the broker, which would close the channel.
            let sent = match wanted.last() {
                Some(last) => is_sent(&last.acker, true).await,
                None => return,
            };
            for wanted in wanted.drain(..) {
                // Who has given up waiting counts the delivery as lost, and may see it again.
                let _ = wanted.sent.send(sent);
            }
        };
        let singles = singles.drain(..).map(async |wanted| {
            let _ = wanted.sent.send(is_sent(&wanted.acker, false).await);
        });
        tokio::join!(prefix, join_all(singles));
    }
}

async fn is_sent(acker: &Acker, multiple: bool) -> bool {
    // `Ok(false)` is lapin's word for an ack that was never sent.
    acker.ack(BasicAckOptions { multiple }).await.unwrap_or(false)
}

/// Which delivery tags have been acked, or are about to be.
#[derive(Debug, Default)]
struct Acked {
    /// All up to this one.
    upto: u64,
    beyond: BTreeSet<u64>,
}

impl Acked {
    fn extend(&mut self, tags: impl Iterator<Item = u64>) {
        self.beyond.extend(tags);
        while self.beyond.remove(&(self.upto + 1)) {
            self.upto += 1;
        }
    }

    fn has_all_to(&self, tag: u64) -> bool {
        tag <= self.upto
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn acks_that_have_died_are_known_to_have() {
        let acks = Acks::start();
        tokio::task::yield_now().await;
        assert!(!acks.have_died());
        let (wanted, incoming) = mpsc::unbounded_channel();
        drop(incoming);
        assert!(Acks { wanted }.have_died());
    }

    #[test]
    fn a_prefix_ends_before_the_first_tag_that_is_missing() {
        let mut acked = Acked::default();
        acked.extend([2, 4].into_iter());
        assert!(!acked.has_all_to(2));
        acked.extend([1].into_iter());
        assert!(acked.has_all_to(2));
        assert!(!acked.has_all_to(4));
        acked.extend([3].into_iter());
        assert!(acked.has_all_to(4));
        assert!(acked.beyond.is_empty());
    }
}
