use service::CancellationToken;
use testbed::{Answer, StatusApi, eventually, free_port};
use tokio::time::timeout;

use crate::{PATIENCE, SECOND, SETTLE_TIME, TestEnv, looked_up, proxied};

/// Waits until `lookups` lookups were made and `ready` messages are left in the queue, and asserts
/// that both numbers stay the same.
async fn assert_lookups_stop(env: &TestEnv, api: &StatusApi, lookups: usize, ready: u32) {
    eventually("the lookups have stopped", PATIENCE, async || {
        (api.lookups().len() == lookups && env.ready().await == ready).then_some(())
    })
    .await;
    let changed = eventually("the lookups continue", PATIENCE, async || {
        (api.lookups().len() != lookups || env.ready().await != ready).then_some(())
    });
    assert!(timeout(SETTLE_TIME, changed).await.is_err(), "{} lookups", api.lookups().len());
}

#[tokio::test]
async fn without_a_database_results_wait_and_are_not_looked_up_again() {
    let env = TestEnv::new().await;
    let (proxy, database) = env.database_proxy().await;
    proxy.cut();
    let api = StatusApi::start(|_, _| Answer::Online);
    env.publish(1..=50).await;
    let consumer = env.start(&api.endpoint(), &[&database, "--max-consumers=5"]);
    // Five lookups in flight and five unwritten results are allowed.
    assert_lookups_stop(&env, &api, 10, 0).await;
    consumer.wait_until_missing(&["database"]).await;

    proxy.restore();
    env.wait_until_recorded(1..=50).await;
    assert_eq!(looked_up(&[&api]), (1..=50).collect::<Vec<_>>());
    consumer.wait_until_missing(&[]).await;
    consumer.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn a_database_lost_during_lookups_costs_no_second_lookup() {
    let env = TestEnv::new().await;
    let (proxy, database) = env.database_proxy().await;
    // The first five lookups are answered long after the cut.
    let api = StatusApi::start(|id, _| match id {
        1..=5 => Answer::After(SECOND * 2, Box::new(Answer::Online)),
        _ => Answer::Online,
    });
    let settings = [&database, "--max-consumers=5", "--write-batch-max=2"];
    let consumer = env.start(&api.endpoint(), &settings);
    env.wait_until_migrated().await;
    env.publish(1..=30).await;
    eventually("lookups are in flight", PATIENCE, async || (api.in_flight() == 5).then_some(()))
        .await;
    proxy.cut();
    // Five lookups in flight and one batch of two results are allowed.
    assert_lookups_stop(&env, &api, 7, 0).await;
    consumer.wait_until_missing(&["database"]).await;

    proxy.restore();
    env.wait_until_recorded(1..=30).await;
    assert_eq!(looked_up(&[&api]), (1..=30).collect::<Vec<_>>());
    consumer.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn a_delivery_is_not_acked_before_the_commit() {
    let env = TestEnv::new().await;
    let (proxy, database) = env.database_proxy().await;
    proxy.cut();
    let api = StatusApi::start(|_, _| Answer::Online);
    env.publish(1..=5).await;
    let consumer = env.start(&api.endpoint(), &[&database]);
    assert_lookups_stop(&env, &api, 5, 0).await;
    consumer.run.abort();
    eventually("all are back in the queue", PATIENCE, async || {
        (env.ready().await == 5).then_some(())
    })
    .await;
    let consumer = env.start(&api.endpoint(), &[]);
    env.wait_until_recorded(1..=5).await;
    consumer.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn lookups_resume_when_the_status_api_is_back() {
    let env = TestEnv::new().await;
    let mut api = StatusApi::start(|_, _| Answer::Online);
    let consumer = env.start(&api.endpoint(), &[]);
    env.publish([1]).await;
    env.wait_until_recorded([1]).await;
    consumer.wait_until_missing(&[]).await;

    api.stop();
    env.publish(2..=5).await;
    consumer.wait_until_missing(&["status API"]).await;
    eventually("all are taken", PATIENCE, async || (env.ready().await == 0).then_some(())).await;
    let _api = StatusApi::start_on(api.address(), |_, _| Answer::Online);
    env.wait_until_recorded(1..=5).await;
    consumer.wait_until_missing(&[]).await;
    consumer.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn a_dropped_table_is_created_again_and_results_are_written() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    let consumer = env.start(&api.endpoint(), &["--max-attempts=1"]);
    env.publish([1]).await;
    env.wait_until_recorded([1]).await;
    sqlx::query("DROP TABLE object").execute(env.database.pool()).await.unwrap();
    env.publish(2..=50).await;
    env.wait_until_recorded(2..=50).await;
    consumer.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn without_any_dependency_the_consumer_names_all_and_runs() {
    let env = TestEnv::new().await;
    let amqp_uri = format!("--amqp-uri=amqp://guest:guest@127.0.0.1:{}/%2f", free_port());
    let database = format!("--database-url=postgres://nobody@127.0.0.1:{}/x", free_port());
    let status_api = format!("http://127.0.0.1:{}", free_port());
    let consumer = env.start(&status_api, &[&amqp_uri, &database]);
    let all = ["broker", "broker, for retries", "database", "status API"];
    eventually("each dependency refused a connection", PATIENCE, async || {
        let missing = consumer.health.missing();
        let refused = missing.iter().filter(|(_, reason)| reason.contains("refused")).count();
        (refused == all.len()).then_some(())
    })
    .await;
    assert_eq!(consumer.missing(), all);
    assert!(!consumer.run.is_finished());
    consumer.stop().await;
}

#[tokio::test]
async fn dependencies_may_start_after_the_consumer_in_any_order() {
    let env = TestEnv::new().await;
    let (broker, amqp_uri) = proxied(&testbed::amqp_uri(), 5672).await;
    let (database, database_url) = env.database_proxy().await;
    broker.cut();
    database.cut();
    let status_api = ([127, 0, 0, 1], free_port()).into();
    env.publish(1..=5).await;
    let settings = [format!("--amqp-uri={amqp_uri}"), database_url];
    let consumer = env.start(&format!("http://{status_api}"), &[&settings[0], &settings[1]]);
    consumer.wait_until_missing(&["broker", "broker, for retries", "database", "status API"]).await;

    broker.restore();
    consumer.wait_until_missing(&["database", "status API"]).await;
    let api = StatusApi::start_on(status_api, |_, _| Answer::Online);
    consumer.wait_until_missing(&["database"]).await;
    eventually("each id is looked up", PATIENCE, async || {
        (looked_up(&[&api]) == [1, 2, 3, 4, 5]).then_some(())
    })
    .await;
    assert_eq!(env.rows().await, [0; 0]);
    database.restore();
    env.wait_until_recorded(1..=5).await;
    consumer.wait_until_missing(&[]).await;
    assert_eq!(looked_up(&[&api]), [1, 2, 3, 4, 5]);
    consumer.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn deliveries_that_waited_at_a_broker_outage_are_looked_up_once() {
    let env = TestEnv::new().await;
    let (broker, amqp_uri) = proxied(&testbed::amqp_uri(), 5672).await;
    let go = CancellationToken::new();
    let noticed = go.clone();
    let api =
        StatusApi::start(move |_, _| Answer::Gated(noticed.clone(), Box::new(Answer::Online)));
    env.publish(1..=100).await;
    let amqp_uri = format!("--amqp-uri={amqp_uri}");
    let consumer = env.start(&api.endpoint(), &[&amqp_uri, "--max-consumers=3"]);
    eventually("all are taken", PATIENCE, async || {
        (api.in_flight() == 3 && env.ready().await == 0).then_some(())
    })
    .await;
    broker.cut();
    consumer.wait_until_missing(&["broker", "broker, for retries"]).await;
    go.cancel();
    broker.restore();
    env.wait_until_recorded(1..=100).await;
    eventually("all messages are settled", PATIENCE, async || {
        (env.ready().await == 0).then_some(())
    })
    .await;
    consumer.stop().await;
    // The three lookups that were in flight may be repeated.
    assert!(api.lookups().len() <= 103, "{} lookups", api.lookups().len());
}

#[tokio::test]
async fn a_broker_connection_lost_during_lookups_loses_no_id() {
    let env = TestEnv::new().await;
    let (broker, amqp_uri) = proxied(&testbed::amqp_uri(), 5672).await;
    let api = StatusApi::start(|_, _| Answer::After(SECOND / 2, Box::new(Answer::Online)));
    env.publish(1..=20).await;
    let amqp_uri = format!("--amqp-uri={amqp_uri}");
    let consumer = env.start(&api.endpoint(), &[&amqp_uri, "--max-consumers=5"]);
    eventually("lookups are in flight", PATIENCE, async || (api.in_flight() == 5).then_some(()))
        .await;
    broker.cut();
    consumer.wait_until_missing(&["broker", "broker, for retries"]).await;
    broker.restore();
    env.wait_until_recorded(1..=20).await;
    consumer.wait_until_missing(&[]).await;
    consumer.stop().await;
    // Messages that were redelivered may still be in the queue; their objects are already recorded.
    assert_eq!((env.in_delay_queues().await, env.dead_letters().await), (0, 0));
}
