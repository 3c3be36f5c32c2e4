//! Logs rejected requests, at most once per interval.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::sleep;

/// The time between two log lines: a misconfigured client may send hundreds of requests per second.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Limits the length of a logged reason, which may quote the client's input.
const MAX_REASON_CHARS: usize = 200;

/// Logs the first rejection at once, and later ones as one line per interval.
pub(crate) struct Rejections {
    state: Mutex<State>,
    interval: Duration,
}

#[derive(Default)]
struct State {
    count: u64,
    latest: Option<Rejection>,
    /// Whether a tokio task will log the count at the end of the interval.
    is_scheduled: bool,
}

pub(crate) struct Rejection {
    pub(crate) callback_id: String,
    pub(crate) status: u16,
    pub(crate) reason: String,
    pub(crate) peer: Option<SocketAddr>,
}

impl Default for Rejections {
    fn default() -> Self {
        Self { state: Mutex::default(), interval: LOG_INTERVAL }
    }
}

impl Rejections {
    pub(crate) fn log(self: &Arc<Self>, rejection: Rejection) {
        let mut state = self.state.lock();
        state.count += 1;
        state.latest = Some(rejection);
        if state.is_scheduled {
            return;
        }
        state.is_scheduled = true;
        state.log();
        let rejections = Arc::clone(self);
        tokio::spawn(async move { rejections.log_until_none().await });
    }

    async fn log_until_none(&self) {
        loop {
            sleep(self.interval).await;
            let mut state = self.state.lock();
            if state.count == 0 {
                state.is_scheduled = false;
                return;
            }
            state.log();
        }
    }
}

impl State {
    fn log(&mut self) {
        let count = std::mem::take(&mut self.count);
        let Some(Rejection { callback_id, status, reason, peer }) = self.latest.take() else {
            return;
        };
        let reason: String = reason.chars().take(MAX_REASON_CHARS).collect();
        let peer = peer.map(|peer| peer.to_string());
        tracing::warn!(
            count,
            status,
            reason,
            peer,
            callback_id,
            "requests rejected, the latest one for this reason; \
             their ids are lost unless the client sends them again"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field case 1.14.
    #[tokio::test]
    async fn rejections_are_logged_once_per_interval() {
        let folder = testkit::Scratch::new("log");
        let path = folder.path().join("log");
        let subscriber = tracing_subscriber::fmt().with_ansi(false);
        let subscriber = subscriber.with_writer(std::fs::File::create(&path).unwrap()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        let lines = || {
            let log = std::fs::read_to_string(&path).unwrap();
            log.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let interval = Duration::from_secs(1);
        let rejections = Arc::new(Rejections { interval, ..Rejections::default() });
        let reject = |reason: &str| {
            let (callback_id, reason) = ("id".to_owned(), reason.to_owned());
            rejections.log(Rejection { callback_id, status: 404, reason, peer: None });
        };
        reject("first");
        assert_eq!(lines().len(), 1);
        reject("second");
        reject(&"x".repeat(1 << 20));
        assert_eq!(lines().len(), 1);
        let deadline = Duration::from_secs(30);
        testkit::eventually("the later rejections are logged", deadline, async || {
            (lines().len() > 1).then_some(())
        })
        .await;
        let lines = lines();
        assert_eq!(lines.len(), 2);
        assert!(lines[0].contains("count=1") && lines[0].contains("first"), "{}", lines[0]);
        assert!(lines[1].contains("count=2") && lines[1].len() < 1_000, "{}", lines[1]);
    }
}
