//! Detects that a task or thread that the process cannot work without has ended too early.
//!
//! Decision: docs/decisions/0075-how-is-the-end-of-a-critical-task-noticed.md

use std::pin::pin;
use std::sync::{Arc, Weak};

use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// Supervises critical tasks. When one panics, or ends while it is still needed, [`crate::main`]
/// ends the process and names the task in the last log line. Otherwise the process would
/// keep running without doing its work.
///
/// Clones share their state. [`crate::main`] ends the process only for failures of the supervisor
/// in its [`crate::Context`]; with any other supervisor, the caller must wait for
/// [`Supervisor::failure`].
#[derive(Clone, Default)]
pub struct Supervisor(Arc<watch::Sender<State>>);

#[derive(Default)]
struct State {
    running: Vec<String>,
    /// The first task that ended while it was still needed.
    failed: Option<String>,
}

impl Supervisor {
    /// Spawns a task that must run until the returned handle is dropped.
    pub fn spawn_critical(
        &self,
        name: impl Into<String>,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> CriticalTask {
        let (needed, running) = self.register(name);
        let task = tokio::spawn(async move {
            let task = pin!(task);
            // When the task panics, `_running` is dropped before the task and its channels, so the
            // supervisor records the failure before other tasks see the channels close.
            let _running = running;
            task.await;
        });
        CriticalTask { needed, task: AbortOnDropHandle::new(task) }
    }

    /// Registers a task or thread that the caller starts. The task or thread holds the [`Running`];
    /// everything that needs it holds a clone of the [`Needed`].
    pub fn register(&self, name: impl Into<String>) -> (Needed, Running) {
        let name = name.into();
        let needed = Arc::new(());
        let weak = Arc::downgrade(&needed);
        self.0.send_modify(|state| state.running.push(name.clone()));
        (Needed(needed), Running { name, needed: weak, supervisor: self.clone() })
    }

    /// Waits until a task ends while it is needed, and returns its name.
    pub async fn failure(&self) -> String {
        let mut state = self.0.subscribe();
        match state.wait_for(|state| state.failed.is_some()).await {
            Ok(state) => state.failed.clone().unwrap_or_default(),
            // Cannot happen, because `self` has the sender.
            Err(_) => std::future::pending().await,
        }
    }

    /// The names of the running tasks, sorted.
    #[must_use]
    pub fn running(&self) -> Vec<String> {
        let mut names = self.0.borrow().running.clone();
        names.sort_unstable();
        names
    }
}

/// A critical task. Dropping the handle aborts the task.
#[must_use]
pub struct CriticalTask {
    // Dropped first, so that the abort does not count as a failure.
    needed: Needed,
    task: AbortOnDropHandle<()>,
}

impl CriticalTask {
    /// Lets the task run without the handle until the task returns, for example because its channel
    /// was closed. If the task returns while a clone of the [`Needed`] exists, the supervisor
    /// reports a failure.
    pub fn detach(self) -> Needed {
        drop(self.task.detach());
        self.needed
    }

    /// Allows the task to end, and returns a future that waits until it has ended.
    pub fn finish(self) -> impl Future<Output = ()> + Send {
        let Self { needed, task } = self;
        drop(needed);
        async move {
            // An error means that the task was aborted or panicked. A panic has been logged.
            _ = task.await;
        }
    }

    /// Aborts the task. Returns once the task and everything that it owns have been dropped.
    pub async fn stop(self) {
        let abort = self.task.abort_handle();
        let finished = self.finish();
        abort.abort();
        finished.await;
    }
}

/// Marks a task as needed until the last clone is dropped.
#[derive(Clone)]
#[must_use]
pub struct Needed(#[expect(dead_code, reason = "only its reference count is used")] Arc<()>);

/// Held by a task or thread while it runs. Dropping it while the task is needed is a failure.
#[must_use]
pub struct Running {
    name: String,
    needed: Weak<()>,
    supervisor: Supervisor,
}

impl Drop for Running {
    fn drop(&mut self) {
        let is_failure = self.needed.strong_count() > 0;
        self.supervisor.0.send_modify(|state| {
            if let Some(position) = state.running.iter().position(|name| *name == self.name) {
                state.running.swap_remove(position);
            }
            if is_failure {
                state.failed.get_or_insert_with(|| self.name.clone());
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn first_task_that_panics_or_returns_is_named() {
        let endings: [fn(); 2] = [|| panic!("the task panics in this test"), || {}];
        for end in endings {
            let supervisor = Supervisor::default();
            let (start, started) = oneshot::channel::<()>();
            let _other = supervisor.spawn_critical("other", std::future::pending());
            let _task = supervisor.spawn_critical("worker", async move {
                let _ = started.await;
                end();
            });
            assert_eq!(supervisor.running(), ["other", "worker"]);
            let early = timeout(Duration::from_millis(50), supervisor.failure()).await;
            assert!(early.is_err(), "reported too early");
            start.send(()).unwrap();
            assert_eq!(supervisor.failure().await, "worker");
            assert_eq!(supervisor.running(), ["other"]);
        }
    }

    #[tokio::test]
    async fn panic_is_reported_before_the_channels_of_the_task_close() {
        let supervisor = Supervisor::default();
        let (owned, closed) = oneshot::channel::<()>();
        let _task = supervisor.spawn_critical("worker", async move {
            let _owned = owned;
            tokio::task::yield_now().await;
            panic!("the task panics in this test");
        });
        closed.await.unwrap_err();
        assert!(timeout(Duration::ZERO, supervisor.failure()).await.is_ok());
    }

    #[tokio::test]
    async fn end_of_a_task_that_is_not_needed_is_no_failure() {
        let supervisor = Supervisor::default();
        drop(supervisor.spawn_critical("aborted", std::future::pending()));
        supervisor.spawn_critical("stopped", std::future::pending()).stop().await;
        supervisor.spawn_critical("drained", async {}).finish().await;
        let (start, started) = oneshot::channel::<()>();
        let needed = supervisor.spawn_critical("finished", async move { _ = started.await });
        let needed = needed.detach();
        drop(needed.clone());
        drop(needed);
        drop(start);
        while !supervisor.running().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(timeout(Duration::from_millis(50), supervisor.failure()).await.is_err());
    }
}
