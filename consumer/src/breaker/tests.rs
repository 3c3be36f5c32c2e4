use std::io::{Error, ErrorKind};

use super::*;

fn breaker(flags: &[&str]) -> Arc<Breaker> {
    Breaker::new(&Lookups::of(flags))
}

/// Completes lookups that are answered, then lookups that fail.
async fn complete(breaker: &Arc<Breaker>, answered: usize, failed: usize) {
    let error = Error::from(ErrorKind::Other);
    for _ in 0..answered {
        _ = breaker.acquire().await.complete(&Outcome::Answered);
    }
    for _ in 0..failed {
        _ = breaker.acquire().await.complete(&Outcome::Failed(&error));
    }
}

#[tokio::test]
async fn objects_that_fail_again_do_not_open_the_breaker() {
    let breaker = breaker(&["--max-consumers=10"]);
    let error = Error::from(ErrorKind::Other);
    for _ in 0..100 {
        // If all failures counted, 90% of the lookups would fail; the breaker opens at 85%.
        complete(&breaker, 1, 1).await;
        for _ in 0..8 {
            _ = breaker.acquire().await.complete(&Outcome::FailedAgain(&error));
        }
    }
    assert!(breaker.is_closed());
}

#[tokio::test]
async fn objects_that_fail_again_open_it_if_no_other_is_answered() {
    let breaker = breaker(&[]);
    let error = Error::from(ErrorKind::Other);
    // The breaker never opens with fewer than 20 outcomes.
    for _ in 0..20 {
        assert!(breaker.is_closed());
        _ = breaker.acquire().await.complete(&Outcome::FailedAgain(&error));
    }
    assert!(!breaker.is_closed());
}

#[tokio::test]
async fn a_long_outage_does_not_change_the_adaptive_limit() {
    let breaker = breaker(&["--max-consumers=1000", "--concurrency=adaptive"]);
    let limit = || breaker.state.lock().full_limit();
    let before = limit();
    let error = Error::from(ErrorKind::Other);
    let mut permits = Vec::new();
    for _ in 0..before {
        permits.push(breaker.acquire().await);
    }
    for permit in permits {
        _ = permit.complete(&Outcome::Failed(&error));
    }
    assert!(!breaker.is_closed());
    // More probes than the 200 lookups after which the adaptive limit may change.
    for _ in 0..500 {
        breaker.update(|state| breaker.allow_probe(state));
        complete(&breaker, 0, 1).await;
    }
    assert_eq!(limit(), before);
}

#[tokio::test]
async fn a_maximum_that_changes_while_open_applies_after_recovery() {
    let breaker = breaker(&[]);
    complete(&breaker, 0, 20).await;
    assert!(!breaker.is_closed());
    breaker.apply_settings(&Lookups::of(&["--max-consumers=3"]));
    assert_eq!(breaker.permits.available(), 0);
    breaker.update(|state| breaker.allow_probe(state));
    // One answer is enough to close it, because an answer raises the limit by more than three.
    complete(&breaker, 1, 0).await;
    assert!(breaker.is_closed());
    assert_eq!(breaker.permits.available(), 3);
    breaker.apply_settings(&Lookups::of(&["--max-consumers=5"]));
    assert_eq!(breaker.permits.available(), 5);
}

#[tokio::test]
async fn threshold_and_window_are_settings_that_can_change() {
    let half_of_hundred = Lookups::of(&["--breaker-failure-percent=50", "--breaker-window=100"]);
    let breaker = Breaker::new(&half_of_hundred);
    complete(&breaker, 50, 49).await;
    assert!(breaker.is_closed());
    complete(&breaker, 0, 1).await;
    assert!(!breaker.is_closed());

    // By default, the breaker opens when 85% of the latest 50 lookups have failed.
    let breaker = self::breaker(&[]);
    complete(&breaker, 50, 30).await;
    // The new window starts with the 50 outcomes of the old one: 20 answered, 30 failed. The
    // breaker compares them with the threshold only at the next failure.
    breaker.apply_settings(&half_of_hundred);
    assert!(breaker.is_closed());
    complete(&breaker, 0, 1).await;
    assert!(!breaker.is_closed());

    // A shorter window keeps only the latest 20 outcomes: 3 answered, 17 failed.
    let breaker = Breaker::new(&half_of_hundred);
    complete(&breaker, 80, 17).await;
    breaker.apply_settings(&Lookups::of(&["--breaker-window=20"]));
    complete(&breaker, 0, 1).await;
    assert!(!breaker.is_closed());
}

#[tokio::test]
async fn a_lookup_that_waits_for_the_rate_limiter_holds_no_permit() {
    let breaker = breaker(&["--max-lookups-per-second=20"]);
    let first = breaker.acquire().await;
    let mut waiting = Box::pin(breaker.acquire());
    assert!(futures_util::poll!(&mut waiting).is_pending());
    assert_eq!(breaker.permits.available(), 99);
    _ = first.complete(&Outcome::AskedToWait(Duration::from_mins(1)));
    // The rate limiter lets it start after 50 ms, but the pause does not.
    assert!(timeout(Duration::from_millis(200), &mut waiting).await.is_err());
    breaker.update(|state| breaker.enter_phase(state, Phase::HalfOpen, 1));
    drop(waiting.await);
    assert_eq!(breaker.permits.available(), 1);
}

#[tokio::test]
async fn at_a_low_rate_an_older_answer_is_still_recent() {
    // An answer is recent for the time of ten lookups, but at least for a second.
    for (flags, seconds, is_recent) in [
        (&["--max-lookups-per-second=1"][..], 9, true),
        (&["--max-lookups-per-second=1"], 11, false),
        (&[], 2, false),
    ] {
        let breaker = breaker(flags);
        breaker.update(|state| {
            state.last_answer_at = Instant::now().checked_sub(Duration::from_secs(seconds));
        });
        let error = Error::from(ErrorKind::Other);
        let failure = breaker
            .start_lookup(breaker.permits.acquire().await)
            .complete(&Outcome::Failed(&error));
        assert_eq!(failure.unwrap().answered_before, is_recent, "{flags:?}, {seconds} s");
    }
}
