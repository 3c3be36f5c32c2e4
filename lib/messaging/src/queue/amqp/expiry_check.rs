//! Detects messages that expired in the main queue or in a shard. Lastseen declares these queues
//! without a message TTL, so a policy must have set one.
//!
//! Decision: docs/decisions/0004-how-are-expired-messages-detected.md

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::types::FieldTable;
use tokio::time::timeout;

use super::history;
use super::topology::Topology;
use crate::amqp::{Connection, within_deadline};

/// Shortest time between two checks. Each check hides the dead letters from other clients for a
/// moment.
const INTERVAL: Duration = Duration::from_mins(1);
/// The most dead letters that one check reads, oldest first.
const LETTERS_MAX: u16 = 1_000;
/// A check ends when no letter has arrived for this time.
const IDLE: Duration = Duration::from_millis(500);

/// Checks the dead letters when their number has grown by more than this process has added. All
/// sessions of a process share one `ExpiryCheck`.
#[derive(Default)]
pub(super) struct ExpiryCheck {
    /// How many dead letters this process has added.
    own: AtomicU64,
    // Locked during a check.
    state: tokio::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The number of dead letters at the last inspection.
    dead: u64,
    /// How many dead letters this process had added by then.
    own: u64,
    is_due: bool,
    checked_at: Option<Instant>,
    /// Expired messages among the dead letters at the last check.
    expired: usize,
}

impl ExpiryCheck {
    /// Records that this process is about to add a dead letter.
    pub(super) fn record_own(&self) {
        self.own.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that there are `dead` dead letters, and checks them if necessary.
    pub(super) async fn record_depth(
        &self,
        connection: &Connection,
        topology: &Topology,
        dead: u64,
    ) {
        let mut state = self.state.lock().await;
        let own = self.own.load(Ordering::Relaxed);
        state.is_due |= dead > state.dead.saturating_add(own.saturating_sub(state.own));
        (state.dead, state.own) = (dead, own);
        let is_early = state.checked_at.is_some_and(|at| at.elapsed() < INTERVAL);
        if !state.is_due || is_early {
            return;
        }
        (state.is_due, state.checked_at) = (false, Some(Instant::now()));
        let letters = dead.min(LETTERS_MAX.into());
        match within_deadline(expired_letters(connection, topology, letters)).await {
            Ok(expired_in) => {
                let expired = expired_in.len();
                if let Some(queue) = expired_in.last()
                    && expired > state.expired
                {
                    tracing::error!(
                        messages = expired,
                        queue,
                        "messages expired in the queue before any lookup, because a policy with \
                         `message-ttl` matches it. They are dead letters now; remove the policy, \
                         then redrive them"
                    );
                }
                state.expired = expired;
            }
            Err(error) => {
                tracing::debug!(error, "cannot check the dead letters for expired messages");
            }
        }
    }
}

/// Finds those of the oldest `letters` dead letters that expired in the main queue or in a shard, and
/// returns the queue of each. All letters keep their places in the dead-letter queue.
async fn expired_letters(
    connection: &Connection,
    topology: &Topology,
    letters: u64,
) -> lapin::Result<Vec<String>> {
    let channel = connection.create_channel().await?;
    channel.basic_qos(LETTERS_MAX, BasicQosOptions::default()).await?;
    let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
    let mut deliveries =
        channel.basic_consume(topology.dead.clone(), "".into(), options, none).await?;
    let (mut checked, mut expired_in) = (0, Vec::new());
    while checked < letters {
        let Ok(Some(letter)) = timeout(IDLE, deliveries.next()).await else { break };
        checked += 1;
        let queue = history::expired_in(&letter?.properties);
        expired_in.extend(queue.filter(|queue| topology.is_work_queue(queue)));
    }
    // The broker requeues the letters of a closed channel in order.
    channel.close(200, "done".into()).await?;
    Ok(expired_in)
}
