//! Notices messages that expired in the main queue, which has no time to live of its own: a policy gave it one.
//!
//! Decision: docs/decisions/0004-how-are-expired-messages-detected.md

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use tokio::time::timeout;

use super::history;
use super::link::{Link, RPC_TIMEOUT};
use super::topology::Topology;

/// The least time between two looks at the dead letters, which hide them from others for a moment.
const INTERVAL: Duration = Duration::from_mins(1);
/// Dead letters that are looked at, the oldest first.
const LETTERS: u16 = 1_000;
/// When no letter has come for this time, there are no more.
const IDLE: Duration = Duration::from_millis(500);

/// Looks at the dead letters whenever their number has grown for another reason than this process's own
/// dead letters. One for all sessions of a process.
#[derive(Default)]
pub(super) struct ExpiryCheck {
    own: AtomicU64,
    // Held while the letters are looked at.
    known: tokio::sync::Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// How many there were, and how many of this process, when they were last counted.
    dead: u64,
    own: u64,
    is_due: bool,
    checked_at: Option<Instant>,
    /// How many had expired at the last check.
    expired: usize,
}

impl ExpiryCheck {
    /// This process is about to make a dead letter.
    pub(super) fn note_own(&self) {
        self.own.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that there are `dead` letters.
    pub(super) async fn note(&self, link: &Link, topology: &Topology, dead: u64) {
        let mut known = self.known.lock().await;
        let own = self.own.load(Ordering::Relaxed);
        known.is_due |= dead > known.dead.saturating_add(own.saturating_sub(known.own));
        (known.dead, known.own) = (dead, own);
        let is_early = known.checked_at.is_some_and(|at| at.elapsed() < INTERVAL);
        if !known.is_due || is_early {
            return;
        }
        (known.is_due, known.checked_at) = (false, Some(Instant::now()));
        match timeout(RPC_TIMEOUT, count_expired(link, topology, dead.min(LETTERS.into()))).await {
            Ok(Ok(expired)) => {
                if expired > known.expired {
                    tracing::error!(
                        messages = expired,
                        queue = %topology.queue,
                        "messages expired in the queue before any lookup: a policy with `message-ttl` matches \
                         it. They are dead letters; remove the policy, then redrive them"
                    );
                }
                known.expired = expired;
            }
            Ok(Err(error)) => tracing::debug!(%error, "cannot look at the dead letters"),
            Err(_) => tracing::debug!("cannot look at the dead letters in time"),
        }
    }
}

/// How many of the oldest `letters` dead letters expired in the main queue. All go back where they were.
async fn count_expired(link: &Link, topology: &Topology, letters: u64) -> lapin::Result<usize> {
    let channel = link.create_channel().await?;
    channel.basic_qos(LETTERS, BasicQosOptions::default()).await?;
    let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
    let mut deliveries =
        channel.basic_consume(topology.dead.clone(), "".into(), options, none).await?;
    let (mut looked_at, mut expired) = (0, 0);
    while looked_at < letters {
        let Ok(Some(letter)) = timeout(IDLE, deliveries.next()).await else { break };
        looked_at += 1;
        if history::expired_in(&letter?.properties).is_some_and(|it| it == topology.queue.as_str())
        {
            expired += 1;
        }
    }
    // A closed channel's letters go back in their order.
    channel.close(200, "done".into()).await?;
    Ok(expired)
}
