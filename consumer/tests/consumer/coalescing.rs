use runtime::CancellationToken;
use testkit::{Answer, StatusApi, wait_until};

use crate::TestEnv;
use crate::events::{next_event, subscriber, wait_until_nothing_is_away};

/// Starts a status API that answers the first lookup of object 42 once the returned token is
/// cancelled, and later lookups of it with `then`.
async fn blocked(then: Answer) -> (TestEnv, StatusApi, CancellationToken) {
    let token = CancellationToken::new();
    let go = token.clone();
    let api = StatusApi::start(move |id, lookup| match (id, lookup) {
        (42, 1) => Answer::Online.behind(&go),
        (42, _) => then.clone(),
        _ => Answer::Online,
    });
    (TestEnv::new().await, api, token)
}

/// Starts a lookup of object 42, and lets the consumer take 20 more deliveries of it meanwhile.
async fn deliver_21(env: &TestEnv, api: &StatusApi) {
    env.publish([42]).await;
    wait_until("the lookup is in flight", async || api.in_flight() == 1).await;
    for _ in 0..20 {
        env.publish([42]).await;
    }
    wait_until("all are taken", async || env.ready().await == 0).await;
}

#[tokio::test]
async fn deliveries_that_arrive_during_a_lookup_share_the_next_one() {
    let (env, api, go) = blocked(Answer::Online).await;
    let consumer = env.start(&api.endpoint(), &[]);
    deliver_21(&env, &api).await;
    assert_eq!(api.lookups_of(42), 1);
    go.cancel();
    wait_until("it is looked up again", async || api.lookups_of(42) > 1).await;
    env.drain(consumer).await;
    // When the second lookup starts, some deliveries may not have reached the scheduler yet.
    assert!(api.lookups_of(42) <= 3, "{} lookups", api.lookups_of(42));
}

#[tokio::test]
async fn without_coalescing_each_delivery_has_a_lookup_of_its_own() {
    let (env, api, go) = blocked(Answer::Online).await;
    let consumer = env.start(&api.endpoint(), &["--coalesce=off"]);
    deliver_21(&env, &api).await;
    go.cancel();
    wait_until("each is looked up", async || api.lookups_of(42) == 21).await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn deliveries_that_wait_for_a_permit_share_a_lookup() {
    let (env, api, go) = blocked(Answer::Online).await;
    let consumer = env.start(&api.endpoint(), &["--max-consumers=1"]);
    env.publish([42]).await;
    wait_until("the lookup is in flight", async || api.in_flight() == 1).await;
    for _ in 0..10 {
        env.publish([2, 4]).await;
    }
    wait_until("all are taken", async || env.ready().await == 0).await;
    assert_eq!(api.lookups().len(), 1, "the lookup in flight has the only permit");
    go.cancel();
    env.wait_until_recorded([2, 4, 42]).await;
    env.drain(consumer).await;
    let lookups = [api.lookups_of(2), api.lookups_of(4)];
    assert!(lookups.iter().all(|lookups| *lookups <= 2), "{lookups:?}");
}

#[tokio::test]
async fn a_failed_lookup_counts_for_each_delivery_that_shared_it() {
    let (env, api, go) = blocked(Answer::Status(500)).await;
    let mut subscriber = subscriber(&env).await;
    let consumer = env.start(&api.endpoint(), &["--max-attempts=1"]);
    wait_until_nothing_is_away(&consumer).await;
    deliver_21(&env, &api).await;
    go.cancel();
    wait_until("each delivery becomes a dead letter", async || {
        // The failure counts only while the API answers other lookups.
        env.publish([1]).await;
        env.dead_letters().await == 20
    })
    .await;
    assert_eq!(env.rows().await, [1, 42], "the first lookup said online");
    env.publish([7]).await;
    let mut given_up = 0;
    loop {
        match next_event(&mut subscriber).await {
            (_, 7) => break,
            (name, 42) => given_up += usize::from(name == "given up"),
            (_, id) => assert_eq!(id, 1),
        }
    }
    let lookups = api.lookups_of(42) - 1;
    assert_eq!(given_up, lookups, "one event for each lookup, not for each delivery");
    consumer.stop().await;
}

#[tokio::test]
async fn deliveries_that_wait_for_a_lookup_are_given_back_at_the_stop() {
    let (env, api, go) = blocked(Answer::Online).await;
    let consumer = env.start(&api.endpoint(), &[]);
    deliver_21(&env, &api).await;
    consumer.shutdown.cancel();
    wait_until("the deliveries are given back", async || env.ready().await == 20).await;
    assert_eq!(api.in_flight(), 1, "the others do not wait for the lookup in flight");
    go.cancel();
    consumer.stop().await;
    assert_eq!(api.lookups_of(42), 1);
    assert_eq!(env.ready().await, 20);
}
