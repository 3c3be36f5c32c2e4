//! Sends the acks of one broker session. Acks that complete a prefix of the session's deliveries
//! share one frame.
//!
//! Decision: docs/decisions/0034-how-are-acks-batched.md

use std::collections::BTreeSet;

use futures_util::future::join_all;
use lapin::Acker;
use lapin::options::BasicAckOptions;
use tokio::sync::{mpsc, oneshot};

/// The most acks in one batch. A larger batch would delay the replies to its callers.
const BATCH_MAX: usize = 1_000;

/// Sends acks until it is dropped.
pub(super) struct AckBatcher {
    /// Unbounded, because it never holds more requests than there are unsettled deliveries.
    requests: mpsc::UnboundedSender<AckRequest>,
}

struct AckRequest {
    tag: u64,
    acker: Acker,
    /// Receives whether the ack was sent.
    reply: oneshot::Sender<bool>,
}

impl AckBatcher {
    /// Starts the tokio task that sends the acks. The channel must not have delivered anything yet,
    /// so that tags begin at 1.
    pub(super) fn start() -> Self {
        let (requests, incoming) = mpsc::unbounded_channel();
        tokio::spawn(send_batches(incoming));
        Self { requests }
    }

    /// Whether the task has stopped, so that no delivery of the session can be acked any more.
    pub(super) fn has_stopped(&self) -> bool {
        self.requests.is_closed()
    }

    /// Sends the ack of a delivery. Returns whether it was sent.
    pub(super) async fn send(&self, tag: u64, acker: Acker) -> bool {
        let (reply, sent) = oneshot::channel();
        let requested = self.requests.send(AckRequest { tag, acker, reply });
        requested.is_ok() && sent.await.unwrap_or(false)
    }
}

/// Sends acks in batches: the acks that arrive while one batch is being written form the next.
/// Under load, most acks belong to the prefix, because the consumer commits the results of many
/// deliveries together.
async fn send_batches(mut incoming: mpsc::UnboundedReceiver<AckRequest>) {
    let mut acked = Acked::default();
    let mut requests = Vec::new();
    while incoming.recv_many(&mut requests, BATCH_MAX).await > 0 {
        requests.sort_unstable_by_key(|request| request.tag);
        acked.extend(requests.iter().map(|request| request.tag));
        let mut singles =
            requests.split_off(requests.partition_point(|request| acked.has_all_to(request.tag)));
        let prefix = async {
            // Ack up to the last of these requests, not up to the end of the prefix: the tag there
            // may have been acked before, and the broker closes the channel for a tag that it does
            // not know.
            let sent = match requests.last() {
                Some(last) => is_sent(&last.acker, true).await,
                None => return,
            };
            for request in requests.drain(..) {
                // A caller that has stopped waiting treats the delivery as lost.
                let _ = request.reply.send(sent);
            }
        };
        let singles = singles.drain(..).map(async |request| {
            let _ = request.reply.send(is_sent(&request.acker, false).await);
        });
        tokio::join!(prefix, join_all(singles));
    }
}

async fn is_sent(acker: &Acker, multiple: bool) -> bool {
    // lapin returns `Ok(false)` for an ack that was never sent.
    acker.ack(BasicAckOptions { multiple }).await.unwrap_or(false)
}

/// The delivery tags that have been acked, or are about to be.
#[derive(Debug, Default)]
struct Acked {
    /// All tags up to this one.
    upto: u64,
    /// Single tags after the first missing one.
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
    async fn stopped_task_is_reported() {
        let batcher = AckBatcher::start();
        tokio::task::yield_now().await;
        assert!(!batcher.has_stopped());
        let (requests, incoming) = mpsc::unbounded_channel();
        drop(incoming);
        assert!(AckBatcher { requests }.has_stopped());
    }

    #[test]
    fn prefix_ends_before_the_first_missing_tag() {
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
