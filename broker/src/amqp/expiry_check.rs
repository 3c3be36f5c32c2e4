//! Detects messages that expired in the main queue. It has no message TTL, so a policy must have
//! added one.
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

/// Shortest time between two checks. Each check hides the dead letters from other clients for a
/// moment.
const INTERVAL: Duration = Duration::from_mins(1);
/// How many dead letters are checked at most, oldest first.
const LETTERS: u16 = 1_000;
/// If no letter arrives for this time, there are no more.
const IDLE: Duration = Duration::from_millis(500);

/// Checks the dead letters when their number has grown by more than this process has added. All
/// sessions of a process share one.
#[derive(Default)]
pub(super) struct ExpiryCheck {
    /// How many dead letters this process has added.
    own: AtomicU64,
    // Locked during a check.
    known: tokio::sync::Mutex<Known>,
}

#[derive(Default)]
struct Known {
    /// Dead letters at the last count, and how many of them this process had added.
    dead: u64,
    own: u64,
    is_due: bool,
    checked_at: Option<Instant>,
    /// Expired messages among them at the last check.
    expired: usize,
}

impl ExpiryCheck {
    /// Records that this process is about to add a dead letter.
    pub(super) fn note_own(&self) {
        self.own.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that there are `dead` letters, and checks them if necessary.
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
                        "messages expired in the queue before any lookup, because a policy with \
                         `message-ttl` matches it. They are dead letters now; remove the policy, \
                         then redrive them"
                    );
                }
                known.expired = expired;
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "cannot check the dead letters for expired messages");
            }
            Err(_) => tracing::debug!("checking the dead letters for expired messages timed out"),
        }
    }
}

/// Counts how many of the oldest `letters` dead letters expired in the main queue. It leaves all
/// letters in their places.
async fn count_expired(link: &Link, topology: &Topology, letters: u64) -> lapin::Result<usize> {
    let channel = link.create_channel().await?;
    channel.basic_qos(LETTERS, BasicQosOptions::default()).await?;
    let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
    let mut deliveries =
        channel.basic_consume(topology.dead.clone(), "".into(), options, none).await?;
    let (mut checked, mut expired) = (0, 0);
    while checked < letters {
        let Ok(Some(letter)) = timeout(IDLE, deliveries.next()).await else { break };
        checked += 1;
        if history::expired_in(&letter?.properties).is_some_and(|it| it == topology.queue.as_str())
        {
            expired += 1;
        }
    }
    // The broker requeues the letters of a closed channel in order.
    channel.close(200, "done".into()).await?;
    Ok(expired)
}
