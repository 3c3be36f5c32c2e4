//! Runs async cleanup in a `drop`.

use std::time::Duration;

/// Time limit, so that a server that the test has killed or silenced does not block its end.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs `work` to completion on a thread with its own runtime, because `drop` is not async. It
/// often runs inside a runtime, where blocking on a future panics, or in one that is shutting down.
///
/// It never panics, because it may run while a test panics: a second panic would abort the process.
pub(crate) fn block_on<F>(what: &str, work: impl FnOnce() -> F + Send + 'static)
where
    F: Future<Output = Result<(), String>>,
{
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| error.to_string())?;
        let done = runtime.block_on(async { tokio::time::timeout(DEADLINE, work()).await });
        // A library's thread that still waits for the server would block an orderly shutdown.
        runtime.shutdown_background();
        done.unwrap_or_else(|_| Err(format!("it took longer than {DEADLINE:?}")))
    });
    match thread.join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("testbed: cannot {what}: {error}"),
        Err(_) => eprintln!("testbed: cannot {what}: it panicked"),
    }
}
