//! What a publisher reports about its broker.

use tokio::sync::watch;

use super::refusals::Refusal;
use crate::LinkStatus;
use crate::amqp::link::OutageLog;

/// Keeps the log and both watched values of a publisher up to date.
pub(super) struct Standing {
    name: String,
    outage: OutageLog,
    /// Whether there is a session that batches can be handed to.
    open: watch::Sender<LinkStatus>,
    /// Whether the broker takes messages, for health checks. Unlike `open`, it stays bad while a new session
    /// follows one that was refused, until it is known to fare better.
    status: watch::Sender<LinkStatus>,
    refusal: Option<Refusal>,
}

impl Standing {
    pub(super) fn new(
        name: &str,
        open: watch::Sender<LinkStatus>,
        status: watch::Sender<LinkStatus>,
    ) -> Self {
        Self { name: name.to_owned(), outage: OutageLog::default(), open, status, refusal: None }
    }

    /// A session is open.
    pub(super) fn opened(&mut self) {
        _ = self.open.send_replace(Ok(()));
        match &self.refusal {
            None => self.works(),
            Some(refusal) => _ = self.status.send_replace(Err(refusal.reason())),
        }
    }

    /// A session has ended, or could not be opened.
    pub(super) fn lost(&mut self, reason: String) {
        self.outage.down(&self.name, &reason);
        _ = self.status.send_replace(Err(reason.clone()));
        _ = self.open.send_replace(Err(reason));
    }

    /// A session has ended because a queue refused everything.
    pub(super) fn refused(&mut self, refusal: Refusal) {
        self.lost(refusal.reason());
        self.refusal = Some(refusal);
    }

    /// The broker reads nothing for now, being short of memory or disk, but the connection is sound.
    pub(super) fn blocked(&mut self, reason: &str) {
        tracing::warn!(connection = self.name, reason, "the broker takes no messages for now");
        let reason = format!("blocked: {reason}");
        _ = self.status.send_replace(Err(reason.clone()));
        _ = self.open.send_replace(Err(reason));
    }

    pub(super) fn unblocked(&mut self) {
        tracing::info!(connection = self.name, "the broker takes messages again");
        _ = self.open.send_replace(Ok(()));
        _ = self.status.send_replace(self.refusal.as_ref().map_or(Ok(()), |it| Err(it.reason())));
    }

    /// Whether a queue refused everything in an earlier session and has confirmed nothing since.
    pub(super) fn is_refused(&self) -> bool {
        self.refusal.is_some()
    }

    /// The queue has confirmed a message.
    pub(super) fn confirmed(&mut self, queue: &str) {
        if self.refusal.as_ref().is_some_and(|refusal| refusal.queue.as_str() == queue) {
            self.forgive();
        }
    }

    /// Nothing is known any more of a queue that refused everything.
    pub(super) fn forgive(&mut self) {
        self.refusal = None;
        self.works();
    }

    fn works(&mut self) {
        self.outage.up(&self.name);
        _ = self.status.send_replace(Ok(()));
    }

    /// Why batches are turned away.
    pub(super) fn reason(&self) -> String {
        self.open.borrow().clone().err().unwrap_or_default()
    }
}
