use std::io::{Error, ErrorKind};

use super::*;

#[tokio::test]
async fn objects_that_fail_again_and_again_do_not_trip_it_while_others_are_answered() {
    let breaker = Breaker::new(10, Concurrency::Fixed);
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
    let breaker = Breaker::new(100, Concurrency::Fixed);
    let error = Error::from(ErrorKind::Other);
    for _ in 0..20 {
        assert!(breaker.is_closed());
        _ = breaker.enter().await.leave(&Outcome::FailedAgain(&error));
    }
    assert!(!breaker.is_closed());
}

#[tokio::test]
async fn an_outage_however_long_leaves_an_adaptive_limit_as_it_was() {
    let breaker = Breaker::new(1_000, Concurrency::Adaptive);
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
    let breaker = Breaker::new(100, Concurrency::Fixed);
    let error = Error::from(ErrorKind::Other);
    for _ in 0..20 {
        _ = breaker.enter().await.leave(&Outcome::Failed(&error));
    }
    assert!(!breaker.is_closed());
    breaker.set_max(3);
    assert_eq!(breaker.places.free(), 0);
    breaker.change(|state| breaker.probe(state));
    _ = breaker.enter().await.leave(&Outcome::Answered);
    assert!(breaker.is_closed());
    assert_eq!(breaker.places.free(), 3);
    breaker.set_max(5);
    assert_eq!(breaker.places.free(), 5);
}
