//! Reports the state of a publisher's broker.

use tokio::sync::watch;

use super::refusals::Refusal;
use crate::LinkStatus;
use crate::amqp::link::OutageLog;

/// Logs state changes, and keeps both watched values of a publisher up to date.
pub(super) struct StatusReporter {
    name: String,
    outage: OutageLog,
    /// Whether there is a session that accepts batches.
    open: watch::Sender<LinkStatus>,
    /// Whether the broker accepts messages, for health checks. After a session that ended because a
    /// queue refused all messages, it stays an error until the queue confirms a message.
    status: watch::Sender<LinkStatus>,
    refusal: Option<Refusal>,
}

impl StatusReporter {
    pub(super) fn new(
        name: &str,
        open: watch::Sender<LinkStatus>,
        status: watch::Sender<LinkStatus>,
    ) -> Self {
        Self { name: name.to_owned(), outage: OutageLog::default(), open, status, refusal: None }
    }

    /// Reports that a session is open.
    pub(super) fn opened(&mut self) {
        _ = self.open.send_replace(Ok(()));
        match &self.refusal {
            None => self.mark_healthy(),
            Some(refusal) => _ = self.status.send_replace(Err(refusal.reason())),
        }
    }

    /// Reports that a session has ended, or could not be opened.
    pub(super) fn lost(&mut self, reason: String) {
        self.outage.down(&self.name, &reason);
        _ = self.status.send_replace(Err(reason.clone()));
        _ = self.open.send_replace(Err(reason));
    }

    /// Reports that a session has ended because a queue refused all messages.
    pub(super) fn refused(&mut self, refusal: Refusal) {
        self.lost(refusal.reason());
        self.refusal = Some(refusal);
    }

    /// Reports that the broker is short of memory or disk and has blocked the connection, which
    /// stays open.
    pub(super) fn blocked(&mut self, reason: &str) {
        tracing::warn!(
            connection = self.name,
            reason,
            "the broker has blocked publishing until it has enough memory and disk space"
        );
        let reason = format!("blocked: {reason}");
        _ = self.status.send_replace(Err(reason.clone()));
        _ = self.open.send_replace(Err(reason));
    }

    pub(super) fn unblocked(&mut self) {
        tracing::info!(connection = self.name, "the broker accepts messages again");
        _ = self.open.send_replace(Ok(()));
        _ = self.status.send_replace(self.refusal.as_ref().map_or(Ok(()), |it| Err(it.reason())));
    }

    /// Whether a queue refused all messages of an earlier session and has confirmed none since.
    pub(super) fn is_refused(&self) -> bool {
        self.refusal.is_some()
    }

    /// Records that `queue` has confirmed a message.
    pub(super) fn confirmed(&mut self, queue: &str) {
        if self.refusal.as_ref().is_some_and(|refusal| refusal.queue.as_str() == queue) {
            self.clear_refusal();
        }
    }

    /// Stops reporting the refusal of an earlier session.
    pub(super) fn clear_refusal(&mut self) {
        self.refusal = None;
        self.mark_healthy();
    }

    fn mark_healthy(&mut self) {
        self.outage.up(&self.name);
        _ = self.status.send_replace(Ok(()));
    }

    /// Why batches are rejected.
    pub(super) fn reason(&self) -> String {
        self.open.borrow().clone().err().unwrap_or_default()
    }
}
