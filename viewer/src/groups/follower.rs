//! Follows the changes of objects and updates the statuses of the groups.

use std::sync::Arc;
use std::time::Duration;

use groups::{Announcement, Fact, GroupIndex};
use messaging::events::{Emitter, GroupChange};
use runtime::Reloadable;
use tokio::sync::mpsc;
use tokio::task::{spawn_blocking, yield_now};
use tokio::time::sleep;

use super::candidate::Candidate;
use super::facts::{self, LateChecks};
use super::path_metrics::GroupMetrics;
use super::shown::{self, EncodedChange};
use super::watch::Message;
use super::{Groups, Live};
use crate::object::{Micros, to_micros};
use crate::view_state::{Change, Content, NextItem, SCAN_MAX, TooFarBehind, ViewState};

/// Maximum number of changes to apply in one wake-up, so that a long backlog does not delay the
/// publication of changes.
const CHANGES_MAX: usize = 256;
/// Maximum number of batches of [`SCAN_MAX`] objects to look up in the table in one wake-up. They take
/// about 10 ms, and the next wake-up is at least 40 ms later.
const BATCHES_MAX: usize = 64;
/// Maximum number of messages from the watch in one wake-up.
const MESSAGES_MAX: usize = 4;
/// Maximum number of groups in one event. Each takes about 200 bytes, plus its path.
const ANNOUNCED_TOGETHER: usize = 32;
/// Maximum time between two wake-ups, because the database's clock may be set.
const SLEEP_MAX: Duration = Duration::from_mins(1);

// Decision: docs/decisions/0091-how-are-the-statuses-of-groups-kept-up-to-date.md
/// Keeps the statuses up to date. Only the publisher of changes has it.
pub(crate) struct Follower {
    groups: Arc<Groups>,
    messages: mpsc::Receiver<Message>,
    received: Option<Message>,
    object_ttl: Reloadable<Duration>,
    late_after: Micros,
    /// The number of the latest change that was applied.
    sequence: u64,
    late_checks: LateChecks,
    /// A new definition that is not in effect yet.
    candidate: Option<Candidate>,
    /// The number of definitions that have taken effect.
    definitions: u64,
    /// The first object of the current tree that must still be compared with the table, after
    /// changes were missed.
    rescan: Option<usize>,
    /// Groups whose status has changed since the last announcement.
    changed: Vec<GroupIndex>,
    metrics: GroupMetrics,
    /// Publishes changes of groups for other programs.
    emitter: Emitter,
    /// Whether the last wake-up left work for the next one.
    has_more: bool,
}

impl Follower {
    pub(super) fn new(
        groups: Arc<Groups>,
        messages: mpsc::Receiver<Message>,
        object_ttl: Reloadable<Duration>,
        metrics_depth: usize,
        emitter: Emitter,
    ) -> Self {
        let late_after = facts::late_after(object_ttl.current());
        Self {
            groups,
            messages,
            received: None,
            object_ttl,
            late_after,
            sequence: 0,
            late_checks: LateChecks::default(),
            candidate: None,
            definitions: 0,
            rescan: None,
            changed: Vec::new(),
            metrics: GroupMetrics::new(metrics_depth),
            emitter,
            has_more: false,
        }
    }

    /// Waits until [`Self::follow`] has something to do even if no object changes. `now` is the
    /// time by the database's clock. Cancel-safe.
    pub(crate) async fn wait(&mut self, now: Micros) {
        if self.has_more || self.received.is_some() {
            return;
        }
        let until_due = self.next_due().map_or(SLEEP_MAX, |due| {
            Duration::from_micros(u64::try_from(due.saturating_sub(now)).unwrap_or(0))
        });
        tokio::select! {
            Some(message) = self.messages.recv() => self.received = Some(message),
            object_ttl = self.object_ttl.changed() => self.set_ttl(object_ttl),
            () = self.groups.given_up_added.notified() => {}
            () = sleep(until_due.min(SLEEP_MAX)) => {}
        }
    }

    /// Applies the changes since the last call, and publishes the groups whose status has changed.
    /// Returns whether a new definition has taken effect.
    pub(crate) async fn follow(&mut self, view: &ViewState) -> bool {
        let now = to_micros(view.now());
        let late_before = now.saturating_sub(self.late_after);
        self.has_more = false;
        self.receive(view);
        if *view.is_complete().borrow() {
            self.scan(view, late_before).await;
        }
        self.apply_changes(view, late_before).await;
        self.mark_given_up();
        let is_redefined = self.redefine(view, now).await;
        self.check_late(view, now, late_before).await;
        self.announce(view, now).await;
        is_redefined
    }

    /// When a group or an object changes without an event.
    fn next_due(&self) -> Option<Micros> {
        let live = self.groups.live.read();
        let of_groups = live.iter().flat_map(|Live { tree, announcer, .. }| {
            [announcer.next_due(), tree.next_maintenance_end()].into_iter().flatten()
        });
        let of_groups = of_groups.map(|due| Micros::try_from(due).unwrap_or(Micros::MAX));
        of_groups.chain(self.late_checks.next()).min()
    }

    fn set_ttl(&mut self, object_ttl: Duration) {
        let late_after = facts::late_after(object_ttl);
        if std::mem::replace(&mut self.late_after, late_after) != late_after {
            self.compare_with_table();
        }
    }

    /// Compares all objects with the table, from the next wake-up on.
    fn compare_with_table(&mut self) {
        let live = self.groups.live.read();
        if let Some(live) = &*live {
            self.late_checks = LateChecks::new(live.tree.object_ids().len());
            self.rescan = Some(0);
        }
        if let Some(candidate) = &mut self.candidate {
            candidate.scan_again();
        }
        self.has_more = true;
    }

    fn receive(&mut self, view: &ViewState) {
        for _ in 0..MESSAGES_MAX {
            let message = self.received.take().or_else(|| self.messages.try_recv().ok());
            match message {
                Some(Message::Define(tree, needs_history)) => {
                    if self.candidate.is_none() && self.groups.live.read().is_none() {
                        self.sequence = view.last();
                    }
                    self.candidate = Some(Candidate::new(*tree, needs_history));
                }
                Some(Message::InHistory(ids)) => {
                    if let Some(candidate) = &mut self.candidate {
                        for id in ids {
                            candidate.mark_gone(id);
                        }
                    }
                }
                Some(Message::TakeEffect) => {
                    if let Some(candidate) = &mut self.candidate {
                        candidate.finish_history();
                    }
                }
                None => return,
            }
        }
        self.has_more = true;
    }

    /// Looks up the objects of a new definition, or all objects after changes were missed.
    async fn scan(&mut self, view: &ViewState, late_before: Micros) {
        for _ in 0..BATCHES_MAX {
            match &mut self.candidate {
                Some(candidate) if !candidate.is_scanned() => {
                    let live = self.groups.live.read();
                    candidate.scan(view, late_before, live.as_ref().map(|live| &live.tree));
                }
                _ if self.rescan.is_some() => self.scan_live(view, late_before),
                _ => return,
            }
            yield_now().await;
        }
        self.has_more = true;
    }

    fn scan_live(&mut self, view: &ViewState, late_before: Micros) {
        let mut live = self.groups.live.write();
        let Some(first) = self.rescan.take() else { return };
        let Some(Live { tree, .. }) = &mut *live else { return };
        let ids = tree.object_ids();
        let end = ids.len().min(first + SCAN_MAX);
        self.rescan = (end < ids.len()).then_some(end);
        let ids = ids[first..end].to_vec();
        for (id, last_seen) in ids.iter().zip(view.last_seen(&ids)) {
            let Some(object) = tree.object(*id) else { continue };
            let known = tree.fact(object);
            let fact = last_seen
                .map_or_else(|| facts::absent(known), |seen| facts::seen(seen, late_before));
            tree.set_fact(object, fact, &mut self.changed);
            if let (Fact::Online, Some(last_seen)) = (fact, last_seen) {
                self.late_checks.schedule(object, last_seen.saturating_add(self.late_after));
            }
        }
    }

    async fn apply_changes(&mut self, view: &ViewState, late_before: Micros) {
        if self.candidate.is_none() && self.groups.live.read().is_none() {
            return;
        }
        for _ in 0..CHANGES_MAX {
            match view.next_item(self.sequence, None) {
                Ok(NextItem::Change(change)) => {
                    self.sequence = change.sequence;
                    self.apply(&change, late_before);
                }
                Ok(NextItem::Objects(_) | NextItem::UpToDate) => return,
                Err(TooFarBehind) => {
                    self.sequence = view.last();
                    self.compare_with_table();
                    return;
                }
            }
            yield_now().await;
        }
        self.has_more = true;
    }

    fn apply(&mut self, change: &Change, late_before: Micros) {
        let Content::Objects(kind, objects) = &change.content else { return };
        let mut live = self.groups.live.write();
        for object in objects {
            let fact = facts::changed(*kind, object.last_seen, late_before);
            if let Some(candidate) = &mut self.candidate {
                candidate.set(object.id, fact);
            }
            let Some(Live { tree, .. }) = &mut *live else { continue };
            let Some(index) = tree.object(object.id) else { continue };
            tree.set_fact(index, fact, &mut self.changed);
            if fact == Fact::Online {
                self.late_checks.schedule(index, object.last_seen.saturating_add(self.late_after));
            }
        }
    }

    /// Marks objects as given up, except for those that are online, because a sighting proves more
    /// than a message that failed.
    fn mark_given_up(&mut self) {
        let ids = std::mem::take(&mut *self.groups.given_up.lock());
        let mut live = self.groups.live.write();
        for id in ids {
            if let Some(candidate) = &mut self.candidate {
                candidate.mark_given_up(id);
            }
            if let Some(Live { tree, .. }) = &mut *live
                && let Some(object) = tree.object(id)
                && !facts::is_online(tree.fact(object))
            {
                tree.set_fact(object, Fact::GivenUp, &mut self.changed);
            }
        }
    }

    /// Lets the new definition take effect once the facts about all of its objects are known.
    async fn redefine(&mut self, view: &ViewState, now: Micros) -> bool {
        let is_ready = |candidate: &mut Candidate| candidate.is_ready() && !self.has_more;
        let Some(candidate) = self.candidate.take_if(is_ready) else { return false };
        let groups = Arc::clone(&self.groups);
        self.definitions += 1;
        let definition = self.definitions;
        let build =
            move || candidate.into_live(definition, groups.live.read().as_ref(), as_u64(now));
        // A panic has been logged. The previous definition stays in effect.
        let Ok((live, late_checks)) = spawn_blocking(build).await else { return false };
        self.metrics.redefine(&live.tree, &live.announcer);
        tracing::info!(groups = live.tree.group_count(), "the groups are in effect");
        *self.groups.live.write() = Some(live);
        self.late_checks = late_checks;
        self.rescan = None;
        self.changed.clear();
        self.groups.members.redefine(view.last());
        true
    }

    async fn check_late(&mut self, view: &ViewState, now: Micros, late_before: Micros) {
        for _ in 0..BATCHES_MAX {
            let due = self.late_checks.take_due(now, SCAN_MAX);
            if due.is_empty() {
                return;
            }
            if let Some(Live { tree, .. }) = &mut *self.groups.live.write() {
                let ids: Vec<i64> = due.iter().map(|object| tree.id(*object)).collect();
                for (object, last_seen) in due.into_iter().zip(view.last_seen(&ids)) {
                    // Other facts change by an event, which schedules the next check.
                    let (Fact::Online, Some(last_seen)) = (tree.fact(object), last_seen) else {
                        continue;
                    };
                    if facts::seen(last_seen, late_before) == Fact::Late {
                        tree.set_fact(object, Fact::Late, &mut self.changed);
                    } else {
                        let at = last_seen.saturating_add(self.late_after);
                        self.late_checks.schedule(object, at);
                    }
                }
            }
            yield_now().await;
        }
        self.has_more = true;
    }

    /// Publishes the groups whose announced status changes now.
    async fn announce(&mut self, view: &ViewState, now: Micros) {
        // While objects are compared with the table, the statuses are a mixture of old and new
        // ones.
        if self.rescan.is_some() {
            return;
        }
        let now = as_u64(now);
        let mut due: Vec<Announcement> = Vec::new();
        if let Some(Live { tree, announcer, .. }) = &mut *self.groups.live.write() {
            tree.end_maintenance(now, &mut self.changed);
            announcer.note(tree, &self.changed, now);
            announcer.due(tree, now, &mut due);
        }
        self.changed.clear();
        if due.is_empty() {
            return;
        }
        self.metrics.update(&due);
        for together in due.chunks(ANNOUNCED_TOGETHER) {
            let change = |Live { tree, .. }: &Live| -> Vec<GroupChange> {
                together.iter().filter_map(|announced| shown::change(tree, *announced)).collect()
            };
            let changes = self.groups.live.read().as_ref().map(change).unwrap_or_default();
            view.push_groups(changes.iter().filter_map(EncodedChange::new).collect());
            self.emitter.publish_groups(changes);
            yield_now().await;
        }
    }
}

fn as_u64(time: Micros) -> u64 {
    u64::try_from(time).unwrap_or(0)
}

#[cfg(test)]
mod tests;
