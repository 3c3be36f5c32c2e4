//! The audit, which compares the responses to callbacks with the lookups of the status API, the
//! rows of the table and the dead letters.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use messaging::queue::{DeadLetter, DeadLetterAction, Inspector, Selection};
use tester::ledger::{Answer, Entry};
use testkit::Decisions;

use crate::figures::{Allowed, Figures, Verdict};
use crate::load::{is_2xx, is_in_time};
use crate::rows::committed;
use crate::world::{QUEUE, World};

/// Time without progress after which missing ids count as lost. A failed lookup may wait up to 60 s
/// before it is tried again.
const NO_PROGRESS_TIMEOUT: Duration = Duration::from_secs(75);
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// The recovery from one fault.
pub(crate) struct Recovery {
    /// The end of the fault.
    pub(crate) ended_at: SystemTime,
    /// The time until the system worked again; `None` if it did not.
    pub(crate) took: Option<Duration>,
}

/// The records of a case, which the audit compares.
pub(crate) struct Audit<'a> {
    /// The ledger of the load.
    pub(crate) entries: Vec<Entry>,
    pub(crate) world: &'a World,
}

/// The state of the system when all ids are settled, or when there is no more progress.
struct FinalState {
    lookups: HashMap<i64, Decisions>,
    /// The commit time of each row.
    rows: HashMap<i64, SystemTime>,
    dead_letters: Vec<Option<i64>>,
    /// The accepted ids that are neither settled nor dead letters.
    missing: Vec<i64>,
}

impl Audit<'_> {
    /// Waits until all accepted ids are settled or there is no more progress, and checks the
    /// figures.
    pub(crate) async fn run(self, allowed: Allowed) -> Verdict {
        let accepted = self.accepted();
        let final_state = self.wait_for_final_state(&accepted).await;
        let late = self.entries.iter().filter(|entry| !is_in_time(entry));
        let (cut_off, unanswered): (Vec<&Entry>, Vec<_>) =
            late.partition(|entry| self.is_excused(entry));
        let in_time = || self.entries.iter().filter(|entry| is_in_time(entry));
        let took = self.world.recoveries.iter().map(|recovery| recovery.took);
        let figures = Figures {
            accepted: in_time().filter(|entry| is_2xx(entry)).count(),
            not_2xx: in_time().filter(|entry| !is_2xx(entry)).count(),
            unanswered: unanswered.len(),
            cut_off: cut_off.len(),
            lost: final_state.missing.len(),
            looked_up_twice: final_state
                .lookups
                .values()
                .filter(|lookups| lookups.received > 1)
                .count(),
            dead_letters: final_state.dead_letters.len(),
            // `None` counts as the longest recovery.
            recovery: took.max_by_key(|took| took.unwrap_or(Duration::MAX)).flatten(),
            caught_up: self.caught_up(&accepted, &final_state),
        };
        let mut breaches = figures.breaches(allowed);
        let offline = final_state.rows.keys().filter(|id| !is_online(**id)).count();
        if offline > 0 {
            breaches.push(format!("{offline} objects that were never online are in the table"));
        }
        if !breaches.is_empty() {
            breaches.push(self.response_counts());
            if let Some(entry) = unanswered.iter().min_by_key(|entry| due_at(entry)) {
                breaches.push(self.describe_first_unanswered(entry));
            }
            if let Some(id) = final_state.missing.first() {
                breaches.push(format!("one of the lost ids is {id}"));
            }
        }
        Verdict { figures, breaches }
    }

    /// Each id that must not be lost, and the due time of its callback.
    fn accepted(&self) -> Vec<(i64, SystemTime)> {
        let was_in_flight_at_deletion = |entry: &Entry| {
            let overlaps = |(from, until): &_| ended_at(entry) >= *from && sent_at(entry) <= *until;
            self.world.queue_deletions.iter().any(overlaps)
        };
        let callbacks =
            self.entries.iter().filter(|entry| is_2xx(entry) && !was_in_flight_at_deletion(entry));
        let ids = callbacks.flat_map(|entry| entry.ids.iter().map(|id| (*id, due_at(entry))));
        ids.chain(self.world.prober.accepted().iter().copied()).collect()
    }

    async fn wait_for_final_state(&self, accepted: &[(i64, SystemTime)]) -> FinalState {
        let world = self.world;
        let mut dead_letters = Vec::new();
        let mut fewest_missing = usize::MAX;
        let mut last_progress = Instant::now();
        loop {
            let (lookups, rows) =
                (world.status_api.decisions(), committed(world.database.pool()).await);
            let dead: HashSet<i64> = dead_letters.iter().copied().flatten().collect();
            let is_settled = |id: &i64| {
                let decided = lookups.get(id).is_some_and(|lookups| lookups.answered > 0);
                decided && (!is_online(*id) || rows.contains_key(id)) || dead.contains(id)
            };
            let missing: Vec<i64> =
                accepted.iter().map(|(id, _)| *id).filter(|id| !is_settled(id)).collect();
            if missing.len() < fewest_missing {
                (fewest_missing, last_progress) = (missing.len(), Instant::now());
            }
            // Reads dead letters even if no id is missing: a settled id may also have one.
            let letters = process_dead_letters(&world.broker_uri(), DeadLetterAction::List).await;
            // `None` is a dead letter whose id cannot be read.
            dead_letters = letters.iter().map(|letter| letter.id).collect();
            let dead: HashSet<i64> = dead_letters.iter().copied().flatten().collect();
            if missing.iter().all(|id| dead.contains(id))
                || last_progress.elapsed() > NO_PROGRESS_TIMEOUT
            {
                let missing = missing.into_iter().filter(|id| !dead.contains(id)).collect();
                return FinalState { lookups, rows, dead_letters, missing };
            }
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }

    /// Whether no process could have responded: the connection failed while the case had killed the
    /// producer. A callback that a process kept waiting is not excused.
    fn is_excused(&self, entry: &Entry) -> bool {
        let (due, ended) = (due_at(entry), ended_at(entry));
        matches!(entry.answer, Answer::Failed(_))
            && self
                .world
                .producer_downtimes
                .iter()
                .any(|(from, until)| ended >= *from && until.is_none_or(|until| due <= until))
    }

    /// The longest time from the end of a fault until an id was settled that was accepted before
    /// that end. For each id, the last fault before it was settled counts, because that fault
    /// delayed it.
    fn caught_up(&self, accepted: &[(i64, SystemTime)], final_state: &FinalState) -> Duration {
        let settled_at = |id: &i64| {
            let looked_up = final_state.lookups.get(id).and_then(|lookups| lookups.answered_at);
            final_state.rows.get(id).copied().or(looked_up)
        };
        let delay = |(id, due): &(i64, SystemTime)| {
            let settled_at = settled_at(id)?;
            let ends = self.world.recoveries.iter().map(|recovery| recovery.ended_at);
            let ended_at = ends.filter(|ended_at| (*due..=settled_at).contains(ended_at)).max()?;
            settled_at.duration_since(ended_at).ok()
        };
        accepted.iter().filter_map(delay).max().unwrap_or_default()
    }

    /// The times of the first callback without a response, for the analysis of a failure.
    fn describe_first_unanswered(&self, entry: &Entry) -> String {
        let first = self.entries.iter().map(due_at).min().unwrap_or(UNIX_EPOCH);
        let after = due_at(entry).duration_since(first).unwrap_or_default();
        let (late, took) = (entry.late_us / 1_000, entry.latency_us / 1_000);
        let answer = &entry.answer;
        format!(
            "the first callback without a response was due {after:.1?} after the load began, was sent {late} ms late, \
             and ended with {answer:?} after {took} ms"
        )
    }

    /// The number of each kind of response, for the analysis of a failure.
    fn response_counts(&self) -> String {
        let mut counts = BTreeMap::new();
        for entry in &self.entries {
            let answer = match &entry.answer {
                Answer::Status(status) => status.to_string(),
                Answer::Timeout => "no response".to_owned(),
                Answer::Failed(reason) => reason.clone(),
            };
            *counts.entry(answer).or_insert(0_usize) += 1;
        }
        let counts: Vec<String> =
            counts.iter().map(|(answer, count)| format!("{count} × {answer}")).collect();
        let late = self.entries.iter().map(|entry| entry.late_us / 1_000).max().unwrap_or(0);
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let load: Vec<&str> = load.split(' ').take(2).collect();
        format!(
            "responses: {}; the load generator was up to {late} ms late, the machine's load average over 1 and 5 minutes is {}",
            counts.join(", "),
            load.join(" and ")
        )
    }
}

fn is_online(id: i64) -> bool {
    id % 2 == 0
}

pub(crate) fn due_at(entry: &Entry) -> SystemTime {
    UNIX_EPOCH + Duration::from_micros(entry.due_unix_us)
}

fn sent_at(entry: &Entry) -> SystemTime {
    due_at(entry) + Duration::from_micros(entry.late_us)
}

/// The time at which the callback was answered, was abandoned or failed.
fn ended_at(entry: &Entry) -> SystemTime {
    due_at(entry) + Duration::from_micros(entry.latency_us)
}

/// The services' queue on the broker at `uri`.
pub(crate) fn broker_config(uri: &str) -> messaging::queue::Config {
    messaging::queue::Config {
        amqp_uri: uri.parse().expect("a node's URI should be valid"),
        queue: messaging::queue::QueueConfig {
            queue_name: QUEUE.to_owned(),
            queue_type: messaging::queue::QueueType::Quorum,
            shards: 1,
            amqp_ca: None,
        },
    }
}

/// Applies `action` to all dead letters, and returns them.
pub(crate) async fn process_dead_letters(
    broker_uri: &str,
    action: DeadLetterAction,
) -> Vec<DeadLetter> {
    let config = broker_config(broker_uri);
    let mut letters = Vec::new();
    let inspect = async {
        let mut inspector = Inspector::open(&config).await?;
        let all = Selection::default();
        inspector.dead_letters(&all, action, |letter| letters.push(letter)).await?;
        inspector.close().await;
        Ok::<(), messaging::queue::InspectError>(())
    };
    inspect.await.expect("the dead letters should be readable again");
    letters
}
