use service::CancellationToken;
use testbed::{Answer, StatusApi, eventually};

use crate::{PATIENCE, Surroundings};

/// Answers the first lookup of object 42 once the token is cancelled, and later ones with `then`.
fn held_up(then: Answer) -> (StatusApi, CancellationToken) {
    let token = CancellationToken::new();
    let go = token.clone();
    let api = StatusApi::start(move |id, lookup| match (id, lookup) {
        (42, 1) => Answer::Once(go.clone(), Box::new(Answer::Online)),
        (42, _) => then.clone(),
        _ => Answer::Online,
    });
    (api, token)
}

/// Has object 42 looked up, and 20 more deliveries of it taken while that lookup is in flight.
async fn deliver_21(around: &Surroundings, api: &StatusApi) {
    around.publish([42]).await;
    eventually("the lookup is in flight", PATIENCE, async || (api.in_flight() == 1).then_some(()))
        .await;
    for _ in 0..20 {
        around.publish([42]).await;
    }
    eventually("all are taken", PATIENCE, async || (around.waiting().await == 0).then_some(()))
        .await;
}

#[tokio::test]
async fn what_comes_while_a_lookup_is_in_flight_shares_the_next_one() {
    let around = Surroundings::new().await;
    let (api, go) = held_up(Answer::Online);
    let consumer = around.start(&api.endpoint(), &[]);
    deliver_21(&around, &api).await;
    assert_eq!(api.lookups_of(42), 1);
    go.cancel();
    eventually("it is looked up again", PATIENCE, async || (api.lookups_of(42) > 1).then_some(()))
        .await;
    consumer.stop().await;
    around.assert_all_settled().await;
    // What has been taken may not all have reached the intake yet when the second one begins.
    assert!(api.lookups_of(42) <= 3, "{} lookups", api.lookups_of(42));
}

#[tokio::test]
async fn without_coalescing_each_delivery_has_a_lookup_of_its_own() {
    let around = Surroundings::new().await;
    let (api, go) = held_up(Answer::Online);
    let consumer = around.start(&api.endpoint(), &["--coalesce=off"]);
    deliver_21(&around, &api).await;
    go.cancel();
    eventually("each is looked up", PATIENCE, async || (api.lookups_of(42) == 21).then_some(()))
        .await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn what_waits_for_its_turn_shares_a_lookup_too() {
    let around = Surroundings::new().await;
    let (api, go) = held_up(Answer::Online);
    let consumer = around.start(&api.endpoint(), &["--max-consumers=1"]);
    around.publish([42]).await;
    eventually("the lookup is in flight", PATIENCE, async || (api.in_flight() == 1).then_some(()))
        .await;
    for _ in 0..10 {
        around.publish([2, 4]).await;
    }
    eventually("all are taken", PATIENCE, async || (around.waiting().await == 0).then_some(()))
        .await;
    assert_eq!(api.lookups().len(), 1, "there is one place");
    go.cancel();
    around.recorded([2, 4, 42]).await;
    consumer.stop().await;
    around.assert_all_settled().await;
    let lookups = [api.lookups_of(2), api.lookups_of(4)];
    assert!(lookups.iter().all(|lookups| *lookups <= 2), "{lookups:?}");
}

#[tokio::test]
async fn a_failed_lookup_is_an_attempt_at_each_delivery_that_shared_it() {
    let around = Surroundings::new().await;
    let (api, go) = held_up(Answer::Status(500));
    let consumer = around.start(&api.endpoint(), &["--max-attempts=1"]);
    deliver_21(&around, &api).await;
    go.cancel();
    eventually("they are given up one by one", PATIENCE, async || {
        // Others are answered around it, or the failure would be nobody's.
        around.publish([1]).await;
        (around.dead().await == 20).then_some(())
    })
    .await;
    assert_eq!(around.rows().await, [1, 42], "as the first lookup said");
    consumer.stop().await;
}

#[tokio::test]
async fn what_waits_for_a_lookup_in_flight_is_given_back_at_the_stop() {
    let around = Surroundings::new().await;
    let (api, go) = held_up(Answer::Online);
    let consumer = around.start(&api.endpoint(), &[]);
    deliver_21(&around, &api).await;
    consumer.shutdown.cancel();
    eventually("they are given back", PATIENCE, async || {
        (around.waiting().await == 20).then_some(())
    })
    .await;
    assert_eq!(api.in_flight(), 1, "others need not wait for this one");
    go.cancel();
    consumer.stop().await;
    assert_eq!(api.lookups_of(42), 1);
    assert_eq!(around.waiting().await, 20);
}
