use std::io::{Error, ErrorKind};

use super::*;

fn breaker(flags: &[&str]) -> Arc<Breaker> {
    Breaker::new(&Lookups::of(flags))
}

/// Tells it of lookups that were answered, and of others that failed.
async fn tell(breaker: &Arc<Breaker>, answered: usize, failed: usize) {
    let error = Error::from(ErrorKind::Other);
    for _ in 0..answered {
        _ = breaker.enter().await.leave(&Outcome::Answered);
    }
    for _ in 0..failed {
        _ = breaker.enter().await.leave(&Outcome::Failed(&error));
    }
}

#[tokio::test]
async fn objects_that_fail_again_and_again_do_not_trip_it_while_others_are_answered() {
    let breaker = breaker(&["--max-consumers=10"]);
    let error = Error::from(ErrorKind::Other);
    for _ in 0..100 {
        _ = breaker.enter().await.leave(&Outcome::Answered);
        _ = breaker.enter().await.leave(&Outcome::Failed(&error));
        for _ in 0..8 {
            _ = breaker.enter().await.leave(&Outcome::FailedAgain(&error));
        }
    }
    assert!(breaker.is_closed());
}

#[tokio::test]
async fn objects_that_fail_again_trip_it_when_no_other_is_answered() {
    let breaker = breaker(&[]);
    let error = Error::from(ErrorKind::Other);
    for _ in 0..20 {
        assert!(breaker.is_closed());
        _ = breaker.enter().await.leave(&Outcome::FailedAgain(&error));
    }
    assert!(!breaker.is_closed());
}

#[tokio::test]
async fn an_outage_however_long_leaves_an_adaptive_limit_as_it_was() {
    let breaker = breaker(&["--max-consumers=1000", "--concurrency=adaptive"]);
    let limit = || breaker.state.borrow().whole_limit();
    let before = limit();
    let error = Error::from(ErrorKind::Other);
    let mut places = Vec::new();
    for _ in 0..before {
        places.push(breaker.enter().await);
    }
    for place in places {
        _ = place.leave(&Outcome::Failed(&error));
    }
    assert!(!breaker.is_closed());
    // More probes than there are lookups in a round.
    for _ in 0..500 {
        breaker.change(|state| breaker.probe(state));
        _ = breaker.enter().await.leave(&Outcome::Failed(&error));
    }
    assert_eq!(limit(), before);
}

#[tokio::test]
async fn a_maximum_that_changes_while_it_is_open_is_what_it_opens_up_to() {
    let breaker = breaker(&[]);
    let error = Error::from(ErrorKind::Other);
    for _ in 0..20 {
        _ = breaker.enter().await.leave(&Outcome::Failed(&error));
    }
    assert!(!breaker.is_closed());
    breaker.change_to(&Lookups::of(&["--max-consumers=3"]));
    assert_eq!(breaker.places.free(), 0);
    breaker.change(|state| breaker.probe(state));
    _ = breaker.enter().await.leave(&Outcome::Answered);
    assert!(breaker.is_closed());
    assert_eq!(breaker.places.free(), 3);
    breaker.change_to(&Lookups::of(&["--max-consumers=5"]));
    assert_eq!(breaker.places.free(), 5);
}

#[tokio::test]
async fn how_many_of_how_many_trip_it_is_as_set_also_while_it_is_used() {
    let half_of_hundred = Lookups::of(&["--breaker-failure-percent=50", "--breaker-window=100"]);
    let breaker = Breaker::new(&half_of_hundred);
    tell(&breaker, 50, 49).await;
    assert!(breaker.is_closed());
    tell(&breaker, 0, 1).await;
    assert!(!breaker.is_closed());

    let breaker = self::breaker(&[]);
    tell(&breaker, 50, 30).await;
    // Of the last 100 outcomes it keeps no more than it has: 20 answered, 30 failed.
    breaker.change_to(&half_of_hundred);
    assert!(breaker.is_closed());
    tell(&breaker, 0, 1).await;
    assert!(!breaker.is_closed());

    // A shorter window forgets the older ones.
    let breaker = Breaker::new(&half_of_hundred);
    tell(&breaker, 80, 17).await;
    breaker.change_to(&Lookups::of(&["--breaker-window=20"]));
    tell(&breaker, 0, 1).await;
    assert!(!breaker.is_closed());
}

#[tokio::test]
async fn whoever_waits_for_its_time_holds_no_place_and_a_pause_keeps_it_waiting() {
    let breaker = breaker(&["--max-lookups-per-second=20"]);
    let first = breaker.enter().await;
    let mut waiting = Box::pin(breaker.enter());
    assert!(futures_util::poll!(&mut waiting).is_pending());
    assert_eq!(breaker.places.free(), 99);
    _ = first.leave(&Outcome::AskedToWait(Duration::from_mins(1)));
    // Its time has come by then.
    assert!(timeout(Duration::from_millis(200), &mut waiting).await.is_err());
    breaker.change(|state| breaker.turn(state, Phase::OpeningUp, 1));
    drop(waiting.await);
    assert_eq!(breaker.places.free(), 1);
}

#[tokio::test]
async fn at_a_lookup_per_second_the_answer_before_still_tells_that_the_api_answers() {
    for (flags, seconds, tells) in [
        (&["--max-lookups-per-second=1"][..], 9, true),
        (&["--max-lookups-per-second=1"], 11, false),
        (&[], 2, false),
    ] {
        let breaker = breaker(flags);
        breaker.change(|state| {
            state.answered_at = Instant::now().checked_sub(Duration::from_secs(seconds));
        });
        let error = Error::from(ErrorKind::Other);
        let failure = breaker.begin(breaker.places.enter().await).leave(&Outcome::Failed(&error));
        assert_eq!(failure.unwrap().answered_before, tells, "{flags:?}, {seconds} s");
    }
}
