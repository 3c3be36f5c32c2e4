//! Reopens a session with the broker whenever it ends. A session is a connection that the caller
//! has prepared, for example by declaring queues and opening channels.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use runtime::Status;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::connection::{ConnectError, Connection, connect_avoiding};
use super::uri::Access;

/// Only a session that lasted longer than this resets the backoff. If short sessions reset it too,
/// the reconnector would connect too often to a broker where each session fails at once.
pub(crate) const STABLE_AFTER: Duration = Duration::from_secs(5);
/// Deadline for preparing one session, which may take several requests.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(10);

/// Opens one session after the other, and reports the state of the current one as a status. The
/// reconnector logs one warning when it loses the broker, and one line when the broker is back. It
/// logs failed attempts in between at DEBUG.
pub(crate) struct Reconnector {
    access: Access,
    name: String,
    /// Whether there is a session that is not blocked.
    is_open: watch::Sender<bool>,
    /// Whether the session is healthy; `Ok` only while `is_open` is true.
    status: watch::Sender<Status>,
    delays: ExponentialBackoff,
    next_attempt_at: Instant,
    opened_at: Option<Instant>,
    /// The node of the last connection. The next one should be to another node, because the last
    /// session has failed there.
    last_node: Option<usize>,
    /// True from the warning "no broker" until the line "connected to the broker".
    is_down: bool,
    /// Why an earlier session was unhealthy. The status reports this reason, even while a session
    /// is open, until [`Self::mark_healthy`].
    unhealthy_reason: Option<String>,
}

/// Why a session cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("cannot open a channel: {0}")]
    OpenChannel(#[source] lapin::Error),
    #[error("cannot declare {object}: {source}")]
    Declare { object: String, source: lapin::Error },
    #[error(
        "queue {queue} exists with other arguments, so it might lose messages ({text}); \
         move its messages and delete it, or set another QUEUE_NAME"
    )]
    OtherArguments { queue: String, text: String },
    #[error("cannot consume from the queue: {0}")]
    Consume(#[source] lapin::Error),
    #[error("no response from the broker in time")]
    Timeout(#[from] tokio::time::error::Elapsed),
}

impl Reconnector {
    /// `name` identifies the connections on RabbitMQ's management page.
    pub(crate) fn new(access: Access, name: &str) -> Self {
        Self {
            access,
            name: name.to_owned(),
            is_open: watch::Sender::new(false),
            status: watch::Sender::new(Err("not connected yet".to_owned())),
            delays: backoff(),
            next_attempt_at: Instant::now(),
            opened_at: None,
            last_node: None,
            is_down: false,
            unhealthy_reason: None,
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// `Ok` if there is a healthy session; otherwise the reason, worded for an operator.
    pub(crate) fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Whether there is a session that is not blocked; true whenever the status is `Ok`.
    pub(crate) fn is_open(&self) -> watch::Receiver<bool> {
        self.is_open.subscribe()
    }

    /// Connects and prepares a session, and tries again until it succeeds. Each attempt waits for
    /// the delay after the last failure. If the future is dropped, the next call waits for the rest
    /// of the delay.
    pub(crate) async fn open<S, F>(&mut self, prepare: impl Fn(Connection) -> F) -> S
    where
        F: Future<Output = Result<S, SessionError>>,
    {
        loop {
            sleep_until(self.next_attempt_at).await;
            let opening = async {
                let connection = connect_avoiding(&self.access, &self.name, self.last_node).await?;
                self.last_node = Some(connection.node());
                timeout(PREPARE_TIMEOUT, prepare(connection)).await?
            };
            match opening.await {
                Ok(session) => {
                    self.mark_open();
                    return session;
                }
                Err(error) => self.mark_closed(error.to_string()),
            }
        }
    }

    fn mark_open(&mut self) {
        self.opened_at = Some(Instant::now());
        if self.unhealthy_reason.is_none() {
            self.log_up();
        }
        self.mark_unblocked();
    }

    /// Reports that the session has ended or could not be opened, for this reason, and schedules
    /// the next attempt.
    pub(crate) fn mark_closed(&mut self, reason: String) {
        if self.opened_at.take().is_some_and(|at| at.elapsed() > STABLE_AFTER) {
            self.delays = backoff();
        }
        self.next_attempt_at = Instant::now() + self.delays.next().unwrap_or(STABLE_AFTER);
        let name = &self.name;
        if std::mem::replace(&mut self.is_down, true) {
            tracing::debug!(connection = name, reason, "the broker is still away");
        } else {
            tracing::warn!(connection = name, reason, "no broker; trying again until it is back");
        }
        self.mark_blocked(reason);
    }

    /// Reports that the session has ended because it was connected but unhealthy, for example
    /// because the broker refused all messages. The next session may be unhealthy too, so the
    /// status reports the reason until [`Self::mark_healthy`].
    pub(crate) fn mark_unhealthy(&mut self, reason: String) {
        self.unhealthy_reason = Some(reason.clone());
        self.mark_closed(reason);
    }

    pub(crate) fn mark_healthy(&mut self) {
        if self.unhealthy_reason.take().is_some() {
            self.log_up();
            _ = self.status.send_replace(Ok(()));
        }
    }

    /// Reports that the session cannot be used until [`Self::mark_unblocked`], for this reason.
    pub(crate) fn mark_blocked(&mut self, reason: String) {
        _ = self.status.send_replace(Err(reason));
        _ = self.is_open.send_replace(false);
    }

    pub(crate) fn mark_unblocked(&mut self) {
        _ = self.is_open.send_replace(true);
        _ = self.status.send_replace(self.unhealthy_reason.clone().map_or(Ok(()), Err));
    }

    fn log_up(&mut self) {
        self.is_down = false;
        tracing::info!(connection = self.name, "connected to the broker");
    }
}

/// The delays between attempts at an operation that must succeed eventually. They double from
/// 100 ms up to 700 ms, plus jitter, and never run out.
#[must_use]
pub fn backoff() -> ExponentialBackoff {
    ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(Duration::from_millis(700))
        .with_jitter()
        .without_max_times()
        .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reconnector() -> Reconnector {
        let uri = "amqp://localhost:1".parse().unwrap();
        Reconnector::new(Access { uri, authorities: None }, "test")
    }

    #[test]
    fn unhealthy_session_is_reported_until_one_is_healthy() {
        let mut reconnector = reconnector();
        let (is_open, status) = (reconnector.is_open(), reconnector.status());
        let state = || (*is_open.borrow(), status.borrow().clone().err());
        let reason = |text: &str| Some(text.to_owned());
        assert_eq!(state(), (false, reason("not connected yet")));
        reconnector.mark_open();
        assert_eq!(state(), (true, None));
        reconnector.mark_unhealthy("all refused".to_owned());
        reconnector.mark_closed("cannot reach it".to_owned());
        assert_eq!(state(), (false, reason("cannot reach it")));
        reconnector.mark_open();
        assert_eq!(state(), (true, reason("all refused")));
        reconnector.mark_blocked("low on memory".to_owned());
        assert_eq!(state(), (false, reason("low on memory")));
        reconnector.mark_unblocked();
        assert_eq!(state(), (true, reason("all refused")));
        reconnector.mark_healthy();
        assert_eq!(state(), (true, None));
        reconnector.mark_closed("closed".to_owned());
        reconnector.mark_open();
        assert_eq!(state(), (true, None));
    }

    #[test]
    fn delay_grows_until_a_session_was_stable() {
        let mut reconnector = reconnector();
        let delay_after = |reconnector: &mut Reconnector, session: Duration| {
            reconnector.opened_at = Instant::now().checked_sub(session);
            reconnector.mark_closed("closed".to_owned());
            reconnector.next_attempt_at.saturating_duration_since(Instant::now())
        };
        for _ in 0..5 {
            delay_after(&mut reconnector, STABLE_AFTER / 2);
        }
        let grown = delay_after(&mut reconnector, STABLE_AFTER / 2);
        assert!(grown > Duration::from_millis(600), "{grown:?}");
        let first = delay_after(&mut reconnector, STABLE_AFTER * 2);
        assert!(first < Duration::from_millis(300), "{first:?}");
    }

    #[tokio::test]
    async fn dropped_attempt_keeps_the_delay() {
        let mut reconnector = reconnector();
        for _ in 0..5 {
            reconnector.mark_closed("closed".to_owned());
        }
        let until = reconnector.next_attempt_at;
        let opening = reconnector.open(async |_| Ok(()));
        timeout(Duration::from_millis(10), opening).await.unwrap_err();
        assert_eq!(reconnector.next_attempt_at, until);
    }
}
