//! Runs a service or command until it ends, and drains it on a signal.
//!
//! Decision: docs/decisions/0009-how-does-a-server-stop-without-losing-requests.md

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use crate::{Context, log_output};

/// Signals that arrive within this time of the first one count as the same signal: GNU `timeout`
/// signals the process and then its process group.
const SAME_SIGNAL_WINDOW: Duration = Duration::from_millis(200);

const SIGTERM: &str = "SIGTERM";

pub(crate) struct Shutdown {
    /// Time between the first "not ready" of `/readyz` and the drain.
    pub(crate) drain_delay: Duration,
    pub(crate) drain_timeout: Duration,
}

/// A service or a command. It is boxed so that the code that runs it is compiled only once.
pub(crate) type Work = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

/// Runs `work` until it ends. Abandons `work` and fails if a critical task ends too early, if the
/// drain takes too long, or if a second signal arrives during the drain.
pub(crate) async fn run_until_stopped(
    work: Work,
    context: Context,
    signals: Signals,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    // Spawned, so that a panic of `work` becomes an error here.
    let work = tokio::spawn(work);
    tokio::select! {
        // Checked first, because the end of a critical task may also make `work` fail.
        biased;
        task = context.supervisor.failure() => anyhow::bail!("the {task} stopped"),
        result = work => result.context("the main task failed")?,
        error = abandon_after_signal(&context, signals, shutdown) => error,
    }
}

/// The signals that stop the process or reload its settings.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
    /// Whether the process started with a terminal on standard error.
    had_terminal: bool,
    /// Notified of each SIGHUP that requests a reload. A SIGHUP that reports a lost terminal stops
    /// the process instead.
    pub(crate) reload_requests: Arc<Notify>,
}

impl Signals {
    pub(crate) fn watch() -> anyhow::Result<Self> {
        let terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
        let interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
        let hangup = signal(SignalKind::hangup()).context("cannot watch for SIGHUP")?;
        let had_terminal = log_output::is_terminal();
        Ok(Self { terminate, interrupt, hangup, had_terminal, reload_requests: Arc::default() })
    }

    /// Waits for the next signal that stops the process, and returns its name.
    async fn next_stop(&mut self) -> &'static str {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return SIGTERM,
                _ = self.interrupt.recv() => return "SIGINT",
                _ = self.hangup.recv() => {
                    if self.had_terminal && !log_output::is_terminal() {
                        return "SIGHUP";
                    }
                    self.reload_requests.notify_one();
                }
            }
        }
    }
}

/// Starts the drain at the first signal. Fails at the second one, or when the drain takes too long.
async fn abandon_after_signal(
    context: &Context,
    mut signals: Signals,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let Shutdown { drain_delay, drain_timeout } = shutdown;
    let name = signals.next_stop().await;
    let first = Instant::now();
    // After SIGTERM, a load balancer needs time to notice that this process is not ready; until
    // then it sends requests, which need an open port. Ctrl-c comes from an operator at a terminal,
    // where no balancer is involved and a delay is a nuisance.
    let delay = if name == SIGTERM { drain_delay } else { Duration::ZERO };
    let drain = async {
        context.health.drain();
        if !delay.is_zero() {
            tracing::info!(signal = name, ?delay, "no longer ready; still accepting requests");
            sleep(delay).await;
        }
        tracing::info!(signal = name, timeout = ?drain_timeout, "draining");
        context.shutdown.cancel();
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
