//! Whether the status API can be reached, so that readiness does not depend on there being something to
//! look up.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::addresses::Addresses;
use super::{MAX_CONNECT_TIME, Reachable};

const PROBE_INTERVAL: Duration = Duration::from_secs(2);
/// An API that has answered a lookup within this time can be reached, whatever the probe finds.
const RECENTLY: Duration = Duration::from_secs(5);
/// Why the API is not reachable before the first attempt.
pub(super) const NOT_YET: &str = "not asked yet";

/// When the API last answered a lookup, with whatever status. Clones share it.
#[derive(Clone, Default)]
pub(super) struct LastAnswer(Arc<Mutex<Option<Instant>>>);

impl LastAnswer {
    pub(super) fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    fn is_recent(&self) -> bool {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|at| at.elapsed() < RECENTLY)
    }
}

/// Keeps `status` up to date: the breaker's state, which is bad news only, and whether the API can be
/// reached.
pub(super) async fn probe(
    host_and_port: String,
    addresses: Addresses,
    last_answer: LastAnswer,
    mut by_lookups: watch::Receiver<Reachable>,
    status: watch::Sender<Reachable>,
) {
    let mut before = Err(NOT_YET.to_owned());
    loop {
        let connected = addresses.race(MAX_CONNECT_TIME).await;
        let reachable = match connected {
            Err(error) if !last_answer.is_recent() => {
                Err(format!("cannot reach {host_and_port}: {error}"))
            }
            _ => Ok(()),
        };
        match &reachable {
            // Once for each outage; the first attempt of all counts as one.
            Err(reason) if before.is_ok() || before == Err(NOT_YET.to_owned()) => {
                tracing::warn!(reason, "no status API; lookups wait until it can be reached");
            }
            Err(reason) => tracing::debug!(reason, "still no status API"),
            Ok(()) if before.is_err() => tracing::info!("the status API can be reached"),
            Ok(()) => {}
        }
        before.clone_from(&reachable);
        let answers = by_lookups.borrow_and_update().clone();
        _ = status.send_replace(reachable.and(answers));
        // A change of the breaker's state is published at once. Its sender may be gone at the shutdown.
        let news = async {
            if by_lookups.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        _ = timeout(PROBE_INTERVAL, news).await;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// The status that a probe comes to which can connect to nothing.
    async fn status(last_answer: LastAnswer) -> Reachable {
        // Nobody listens there any more.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let addresses = Addresses::fixed(&[listener.local_addr().unwrap()]);
        drop(listener);
        let (_breaker, by_lookups) = watch::channel(Ok(()));
        let (sender, mut status) = watch::channel(Err(NOT_YET.to_owned()));
        let probe = probe("api:80".to_owned(), addresses, last_answer, by_lookups, sender);
        tokio::select! {
            () = probe => unreachable!("it never ends"),
            changed = timeout(PATIENCE, status.changed()) => changed.unwrap().unwrap(),
        }
        status.borrow().clone()
    }

    // Field case 3.8.
    #[tokio::test]
    async fn an_api_that_answers_can_be_reached() {
        let refused = status(LastAnswer::default()).await.unwrap_err();
        assert!(refused.starts_with("cannot reach api:80: "), "{refused}");
        let answered = LastAnswer::default();
        answered.note();
        assert_eq!(status(answered).await, Ok(()));
    }
}
