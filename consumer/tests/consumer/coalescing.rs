use service::CancellationToken;
use testbed::{Answer, StatusApi, eventually};

use crate::{PATIENCE, TestEnv};

/// Answers the first lookup of object 42 once the token is cancelled, and later ones with `then`.
fn blocked(then: Answer) -> (StatusApi, CancellationToken) {
    let token = CancellationToken::new();
    let go = token.clone();
    let api = StatusApi::start(move |id, lookup| match (id, lookup) {
        (42, 1) => Answer::Gated(go.clone(), Box::new(Answer::Online)),
        (42, _) => then.clone(),
        _ => Answer::Online,
    });
    (api, token)
}

/// Starts a lookup of object 42, and lets the consumer take 20 more deliveries of it meanwhile.
async fn deliver_21(env: &TestEnv, api: &StatusApi) {
    env.publish([42]).await;
    eventually("the lookup is in flight", PATIENCE, async || (api.in_flight() == 1).then_some(()))
        .await;
    for _ in 0..20 {
        env.publish([42]).await;
    }
    eventually("all are taken", PATIENCE, async || (env.ready().await == 0).then_some(())).await;
}

#[tokio::test]
async fn deliveries_that_arrive_during_a_lookup_share_the_next_one() {
    let env = TestEnv::new().await;
    let (api, go) = blocked(Answer::Online);
    let consumer = env.start(&api.endpoint(), &[]);
    deliver_21(&env, &api).await;
    assert_eq!(api.lookups_of(42), 1);
    go.cancel();
    eventually("it is looked up again", PATIENCE, async || (api.lookups_of(42) > 1).then_some(()))
        .await;
    consumer.stop().await;
    env.assert_all_settled().await;
    // When the second lookup starts, some deliveries may not have reached the scheduler yet.
    assert!(api.lookups_of(42) <= 3, "{} lookups", api.lookups_of(42));
}

#[tokio::test]
async fn without_coalescing_each_delivery_has_a_lookup_of_its_own() {
    let env = TestEnv::new().await;
    let (api, go) = blocked(Answer::Online);
    let consumer = env.start(&api.endpoint(), &["--coalesce=off"]);
    deliver_21(&env, &api).await;
    go.cancel();
    eventually("each is looked up", PATIENCE, async || (api.lookups_of(42) == 21).then_some(()))
        .await;
    consumer.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn deliveries_that_wait_for_a_permit_share_a_lookup() {
    let env = TestEnv::new().await;
    let (api, go) = blocked(Answer::Online);
    let consumer = env.start(&api.endpoint(), &["--max-consumers=1"]);
    env.publish([42]).await;
    eventually("the lookup is in flight", PATIENCE, async || (api.in_flight() == 1).then_some(()))
        .await;
    for _ in 0..10 {
        env.publish([2, 4]).await;
    }
    eventually("all are taken", PATIENCE, async || (env.ready().await == 0).then_some(())).await;
    assert_eq!(api.lookups().len(), 1, "one lookup may run");
    go.cancel();
    env.wait_until_recorded([2, 4, 42]).await;
    consumer.stop().await;
    env.assert_all_settled().await;
    let lookups = [api.lookups_of(2), api.lookups_of(4)];
    assert!(lookups.iter().all(|lookups| *lookups <= 2), "{lookups:?}");
}

#[tokio::test]
async fn a_failed_lookup_counts_for_each_delivery_that_shared_it() {
    let env = TestEnv::new().await;
    let (api, go) = blocked(Answer::Status(500));
    let consumer = env.start(&api.endpoint(), &["--max-attempts=1"]);
    deliver_21(&env, &api).await;
    go.cancel();
    eventually("each delivery becomes a dead letter", PATIENCE, async || {
        // The failure counts only while the API answers other lookups.
        env.publish([1]).await;
        (env.dead_letters().await == 20).then_some(())
    })
    .await;
    assert_eq!(env.rows().await, [1, 42], "the first lookup said online");
    consumer.stop().await;
}

#[tokio::test]
async fn deliveries_that_wait_for_a_lookup_are_given_back_at_the_stop() {
    let env = TestEnv::new().await;
    let (api, go) = blocked(Answer::Online);
    let consumer = env.start(&api.endpoint(), &[]);
    deliver_21(&env, &api).await;
    consumer.shutdown.cancel();
    eventually("the deliveries are given back", PATIENCE, async || {
        (env.ready().await == 20).then_some(())
    })
    .await;
    assert_eq!(api.in_flight(), 1, "the others do not wait for the lookup in flight");
    go.cancel();
    consumer.stop().await;
    assert_eq!(api.lookups_of(42), 1);
    assert_eq!(env.ready().await, 20);
}
