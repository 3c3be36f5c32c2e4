//! Runs a service or command until it ends, and drains it on a signal.
//!
//! Decision: docs/decisions/0009-how-does-a-server-stop-without-losing-requests.md

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::{Health, terminal};

/// Signals that arrive within this time of the first one count as the same signal: GNU `timeout`
/// signals the process and then its process group.
const SAME_SIGNAL_WINDOW: Duration = Duration::from_millis(200);

const SIGTERM: &str = "SIGTERM";

/// How to stop after the first signal.
pub(crate) struct Shutdown {
    /// Time between "not ready" and the drain.
    pub(crate) drain_delay: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) health: Health,
    /// Cancelled when the drain begins.
    pub(crate) token: CancellationToken,
}

/// Runs `work` until it ends. Abandons it, and fails, if it does not drain in time after a signal.
pub(crate) async fn run_until_stopped(
    work: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    signals: Signals,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    // In a task of its own, so that a panic becomes an error here.
    let work = tokio::spawn(work);
    tokio::select! {
        result = work => result.context("the main task failed")?,
        error = abandon_after_signal(signals, shutdown) => error,
    }
}

/// The signals that stop the process or reload its settings.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// Whether the process started with a terminal on standard error.
    had_terminal: bool,
    /// Notified of each SIGHUP that does not come from a lost terminal: it requests a reload.
    pub(crate) reload_requests: Arc<Notify>,
}

impl Signals {
    pub(crate) fn watch() -> anyhow::Result<Self> {
        let terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
        let interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
        let hangup = signal(SignalKind::hangup()).context("cannot watch for SIGHUP")?;
        let had_terminal = terminal::is_attached();
        Ok(Self { terminate, interrupt, hangup, had_terminal, reload_requests: Arc::default() })
    }

    /// Waits for the next signal that stops the process, and returns its name.
    async fn next_stop(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return SIGTERM,
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hangup.recv() => {
                    if self.had_terminal && !terminal::is_attached() {
                        return "SIGHUP";
                    }
                    self.reload_requests.notify_one();
                }
            }
        }
    }
}

/// Starts the drain at the first signal. Fails at the second one, or when the drain takes too long.
async fn abandon_after_signal(mut signals: Signals, shutdown: Shutdown) -> anyhow::Result<()> {
    let Shutdown { drain_delay, drain_timeout, health, token } = shutdown;
    let name = signals.next_stop().await;
    let first = Instant::now();
    // A balancer that still sends requests here would find the port closed after the drain. Ctrl-c
    // comes from an operator at a terminal, where no balancer is involved and waiting is a
    // nuisance.
    let delay = if name == SIGTERM { drain_delay } else { Duration::ZERO };
    let drain = async {
        health.drain();
        if !delay.is_zero() {
            tracing::info!(signal = name, ?delay, "no longer ready; still accepting requests");
            sleep(delay).await;
        }
        tracing::info!(signal = name, timeout = ?drain_timeout, "draining");
        token.cancel();
        sleep(drain_timeout).await;
    };
    let second_signal = async {
        loop {
            let name = signals.next_stop().await;
            if first.elapsed() >= SAME_SIGNAL_WINDOW {
                return name;
            }
        }
    };
    tokio::select! {
        () = drain => anyhow::bail!(
            "the drain took longer than DRAIN_TIMEOUT={drain_timeout:?}; \
             work in flight was left unfinished"
        ),
        name = second_signal => anyhow::bail!("stopped at once by a second signal ({name})"),
    }
}
