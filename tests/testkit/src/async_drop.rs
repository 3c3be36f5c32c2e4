//! Runs async cleanup in a `drop`.

use std::time::Duration;

/// Time limit, so that a server that the test has killed or silenced does not block the test's end.
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs `work` to completion on a thread with its own runtime, because `drop` is not async. The
/// caller's runtime cannot run it: blocking there panics, or that runtime is shutting down.
///
/// Never panics, because a `drop` may run while a test panics: a second panic would abort the
/// process.
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
        done.unwrap_or_else(|_| Err(format!("no result within {DEADLINE:?}")))
    });
    match thread.join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("testkit: cannot {what}: {error}"),
        Err(_) => eprintln!("testkit: cannot {what}: a panic"),
    }
}
