//! Checks whether the status API can be reached, so that readiness does not depend on lookups.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use runtime::Status;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::MAX_CONNECT_TIME;
use super::addresses::Addresses;

const CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// An API that has answered a lookup within this time counts as reachable, even if the check fails.
const RECENT: Duration = Duration::from_secs(5);
/// The reason that is reported before the first check.
pub(super) const NOT_CHECKED: &str = "not checked yet";

/// The time of the last response to a lookup, of any status. Clones share it.
#[derive(Clone, Default)]
pub(super) struct LastAnswer(Arc<Mutex<Option<Instant>>>);

impl LastAnswer {
    pub(super) fn record(&self) {
        *self.0.lock() = Some(Instant::now());
    }

    fn is_recent(&self) -> bool {
        let last = *self.0.lock();
        last.is_some_and(|at| at.elapsed() < RECENT)
    }
}

/// Keeps `status` up to date. The status is an error while the API cannot be reached or the breaker
/// is open.
pub(super) async fn monitor(
    host_and_port: String,
    addresses: Addresses,
    last_answer: LastAnswer,
    mut breaker_status: watch::Receiver<Status>,
    status: watch::Sender<Status>,
) {
    let mut previous = Err(NOT_CHECKED.to_owned());
    loop {
        let connected = addresses.connect_to_any(MAX_CONNECT_TIME).await;
        let reachable = match connected {
            Err(error) if !last_answer.is_recent() => {
                Err(format!("cannot reach {host_and_port}: {error}"))
            }
            _ => Ok(()),
        };
        match &reachable {
            // Logged once for each outage. A failure of the first check is an outage, too.
            Err(reason) if previous.is_ok() || previous == Err(NOT_CHECKED.to_owned()) => {
                tracing::warn!(
                    reason,
                    "no status API: cannot connect to it; lookups wait until it can be reached"
                );
            }
            Err(reason) => tracing::debug!(reason, "still cannot connect to the status API"),
            Ok(()) if previous.is_err() => tracing::info!("connected to the status API"),
            Ok(()) => {}
        }
        previous.clone_from(&reachable);
        let breaker = breaker_status.borrow_and_update().clone();
        _ = status.send_replace(reachable.and(breaker));
        // Publish a change of the breaker's status at once. During the shutdown, the breaker may
        // have been dropped.
        let breaker_changed = async {
            if breaker_status.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        _ = timeout(CHECK_INTERVAL, breaker_changed).await;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// The status after a check that cannot connect.
    async fn status(last_answer: LastAnswer) -> Status {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addresses = Addresses::fixed(&[listener.local_addr().unwrap()]);
        drop(listener);
        let (_breaker, breaker_status) = watch::channel(Ok(()));
        let (sender, mut status) = watch::channel(Err(NOT_CHECKED.to_owned()));
        let monitor = monitor("api:80".to_owned(), addresses, last_answer, breaker_status, sender);
        tokio::select! {
            () = monitor => unreachable!("the monitor never returns"),
            changed = timeout(PATIENCE, status.changed()) => changed.unwrap().unwrap(),
        }
        status.borrow().clone()
    }

    // Field case 3.8.
    #[tokio::test]
    async fn an_api_that_answers_lookups_counts_as_reachable() {
        let refused = status(LastAnswer::default()).await.unwrap_err();
        assert!(refused.starts_with("cannot reach api:80: "), "{refused}");
        let answered = LastAnswer::default();
        answered.record();
        assert_eq!(status(answered).await, Ok(()));
    }
}
