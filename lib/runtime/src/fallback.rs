//! Tries several servers or addresses until one works.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::time::{Instant, sleep};

/// The first success among several attempts.
#[derive(Debug, PartialEq, Eq)]
pub struct Success<T, E> {
    /// The value of the attempt that succeeded.
    pub value: T,
    /// The attempts that had failed or were silent by then, with their positions.
    pub unusable: Vec<(usize, Unusable<E>)>,
}

/// Why an attempt was not the first success.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable<E> {
    /// It failed.
    #[error(transparent)]
    Failed(E),
    /// It had not ended after this time.
    #[error("no answer within {0:?}")]
    Silent(Duration),
}

/// Runs `attempts` in order until one succeeds, returns its value, and drops the others.
///
/// The next attempt starts when an earlier one fails, or when no attempt has ended for `patience`.
/// Meanwhile the earlier attempts continue, so that a slow server is not given up.
///
/// # Errors
/// The errors of all attempts with their positions, in the order in which they failed; an empty
/// list if there is no attempt.
pub async fn first_success<T, E, F>(
    attempts: impl IntoIterator<Item = F>,
    patience: Duration,
) -> Result<Success<T, E>, Vec<(usize, E)>>
where
    F: Future<Output = Result<T, E>>,
{
    let mut waiting = attempts.into_iter().enumerate().fuse().peekable();
    let mut running = FuturesUnordered::new();
    let mut unfinished = Vec::new();
    let mut errors = Vec::new();
    loop {
        if let Some((position, attempt)) = waiting.next() {
            unfinished.push((position, Instant::now()));
            running.push(async move { (position, attempt.await) });
        }
        tokio::select! {
            biased;
            Some((position, outcome)) = running.next() => {
                unfinished.retain(|(other, _)| *other != position);
                match outcome {
                    Ok(value) => {
                        unfinished.retain(|(_, started)| started.elapsed() >= patience);
                        let failed = errors.into_iter();
                        let failed = failed.map(|(at, error)| (at, Unusable::Failed(error)));
                        let silent = unfinished.into_iter();
                        let silent = silent.map(|(at, _)| (at, Unusable::Silent(patience)));
                        return Ok(Success { value, unusable: failed.chain(silent).collect() });
                    }
                    Err(error) => errors.push((position, error)),
                }
            }
            () = sleep(patience), if waiting.peek().is_some() => {}
            else => return Err(errors),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use futures_util::FutureExt as _;
    use futures_util::future::BoxFuture;

    use super::*;

    const LONG: Duration = Duration::from_hours(1);
    const SHORT: Duration = Duration::from_millis(100);

    type Attempt = BoxFuture<'static, Result<u8, &'static str>>;

    fn ends(outcome: Result<u8, &'static str>) -> Attempt {
        async move { outcome }.boxed()
    }

    #[tokio::test]
    async fn failure_starts_the_next_attempt_at_once() {
        // The third attempt must not start, because the second one succeeds.
        let attempts = [ends(Err("refused")), ends(Ok(2)), async { panic!("started") }.boxed()];
        let failed = vec![(0, Unusable::Failed("refused"))];
        assert_eq!(first_success(attempts, LONG).await, Ok(Success { value: 2, unusable: failed }));
    }

    #[tokio::test]
    async fn silent_attempt_does_not_hold_up_the_next() {
        let attempts = [pending().boxed(), ends(Ok(2))];
        let silent = vec![(0, Unusable::Silent(SHORT))];
        assert_eq!(
            first_success(attempts, SHORT).await,
            Ok(Success { value: 2, unusable: silent })
        );
    }

    #[tokio::test]
    async fn slow_attempt_can_still_succeed() {
        let (second_has_started, started) = tokio::sync::oneshot::channel();
        let slow: Attempt = async { started.await.map_err(|_| "dropped") }.boxed();
        let second = async {
            second_has_started.send(1).unwrap();
            pending().await
        };
        let success = first_success([slow, second.boxed()], SHORT).await;
        // The second attempt has only just started, so it does not count as silent.
        assert_eq!(success, Ok(Success { value: 1, unusable: vec![] }));
    }

    #[tokio::test]
    async fn all_errors_are_returned() {
        let attempts = [ends(Err("refused")), ends(Err("silent"))];
        assert_eq!(first_success(attempts, LONG).await, Err(vec![(0, "refused"), (1, "silent")]));
        assert_eq!(first_success(Vec::<Attempt>::new(), LONG).await, Err(vec![]));
    }
}
