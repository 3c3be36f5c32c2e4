//! Async work in a `drop`.

use std::time::Duration;

/// A server that a test has killed or silenced must not hold up the end of the test.
const DEADLINE: Duration = Duration::from_secs(10);

/// Does `work` to its end on a thread with a runtime of its own, because `drop` is not async, often
/// runs inside a runtime where blocking on a future panics, and may run in one that is going down.
///
/// It never panics, for it runs while a test panics, and a second panic would abort the process.
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
        // A library's thread that still waits for the server would keep an orderly shutdown waiting.
        runtime.shutdown_background();
        done.unwrap_or_else(|_| Err(format!("it took longer than {DEADLINE:?}")))
    });
    match thread.join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => eprintln!("testbed: cannot {what}: {error}"),
        Err(_) => eprintln!("testbed: cannot {what}: it panicked"),
    }
}
