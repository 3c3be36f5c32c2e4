use testkit::{Answer, Proxy, StatusApi, free_port, wait_until};
use tokio::time::timeout;

use crate::{SECOND, SETTLE_TIME, TestEnv, looked_up};

/// Waits until `lookups` lookups were made and `ready` messages are left in the queue, and asserts
/// that both numbers stay the same.
async fn assert_lookups_stop(env: &TestEnv, api: &StatusApi, lookups: usize, ready: u32) {
    wait_until("the lookups have stopped", async || {
        api.lookups().len() == lookups && env.ready().await == ready
    })
    .await;
    let changed = wait_until("the lookups continue", async || {
        api.lookups().len() != lookups || env.ready().await != ready
    });
    assert!(timeout(SETTLE_TIME, changed).await.is_err(), "{} lookups", api.lookups().len());
}

#[tokio::test]
async fn without_a_database_results_wait_and_are_not_looked_up_again() {
    let (env, api) = TestEnv::with_all_online().await;
    let (proxy, database) = env.database_proxy().await;
    proxy.cut();
    env.publish(1..=50).await;
    let consumer = env.start(&api.endpoint(), &[&database, "--max-consumers=5"]);
    // With MAX_CONSUMERS=5, five lookups in flight and five unwritten results are allowed.
    assert_lookups_stop(&env, &api, 10, 0).await;
    consumer.wait_until_missing(&["database"]).await;

    proxy.restore();
    env.wait_until_recorded(1..=50).await;
    assert_eq!(looked_up(&[&api]), (1..=50).collect::<Vec<_>>());
    consumer.wait_until_missing(&[]).await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn a_database_lost_during_lookups_costs_no_second_lookup() {
    // The first five lookups are answered long after the cut.
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, _| match id {
        1..=5 => Answer::Online.after(SECOND * 2),
        _ => Answer::Online,
    });
    let (proxy, database) = env.database_proxy().await;
    let settings = [&database, "--max-consumers=5", "--write-batch-max=2"];
    let consumer = env.start(&api.endpoint(), &settings);
    env.wait_until_migrated().await;
    env.publish(1..=30).await;
    wait_until("lookups are in flight", async || api.in_flight() == 5).await;
    proxy.cut();
    // Five lookups in flight and one batch of two results are allowed.
    assert_lookups_stop(&env, &api, 7, 0).await;
    consumer.wait_until_missing(&["database"]).await;

    proxy.restore();
    env.wait_until_recorded(1..=30).await;
    assert_eq!(looked_up(&[&api]), (1..=30).collect::<Vec<_>>());
    env.drain(consumer).await;
}

#[tokio::test]
async fn a_delivery_is_not_acked_before_the_commit() {
    let (env, api) = TestEnv::with_all_online().await;
    let (proxy, database) = env.database_proxy().await;
    proxy.cut();
    env.publish(1..=5).await;
    let consumer = env.start(&api.endpoint(), &[&database]);
    assert_lookups_stop(&env, &api, 5, 0).await;
    consumer.run.abort();
    wait_until("all are back in the queue", async || env.ready().await == 5).await;
    let consumer = env.start(&api.endpoint(), &[]);
    env.wait_until_recorded(1..=5).await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn lookups_resume_when_the_status_api_is_back() {
    let (env, mut api) = TestEnv::with_all_online().await;
    let consumer = env.start(&api.endpoint(), &[]);
    env.publish([1]).await;
    env.wait_until_recorded([1]).await;
    consumer.wait_until_missing(&[]).await;

    api.stop();
    env.publish(2..=5).await;
    consumer.wait_until_missing(&["status API"]).await;
    wait_until("all are taken", async || env.ready().await == 0).await;
    api.restart();
    env.wait_until_recorded(1..=5).await;
    consumer.wait_until_missing(&[]).await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn a_dropped_table_is_created_again_and_results_are_written() {
    let (env, api) = TestEnv::with_all_online().await;
    let consumer = env.start(&api.endpoint(), &["--max-attempts=1"]);
    env.publish([1]).await;
    env.wait_until_recorded([1]).await;
    sqlx::query("DROP TABLE object").execute(env.database.pool()).await.unwrap();
    env.publish(2..=50).await;
    env.wait_until_recorded(2..=50).await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn without_any_dependency_the_consumer_names_all_and_runs() {
    let env = TestEnv::new().await;
    let amqp_uri = format!("--amqp-uri=amqp://guest:guest@127.0.0.1:{}/%2f", free_port());
    let database = format!("--database-url=postgres://nobody@127.0.0.1:{}/x", free_port());
    let status_api = format!("http://127.0.0.1:{}", free_port());
    let consumer = env.start(&status_api, &[&amqp_uri, &database]);
    let all = ["broker", "broker, for retries", "database", "status API"];
    wait_until("each dependency refused a connection", async || {
        let missing = consumer.health.missing();
        let refused = missing.iter().filter(|(_, reason)| reason.contains("refused")).count();
        refused == all.len()
    })
    .await;
    assert_eq!(consumer.missing(), all);
    assert!(!consumer.run.is_finished());
    consumer.stop().await;
}

#[tokio::test]
async fn dependencies_may_start_after_the_consumer_in_any_order() {
    let env = TestEnv::new().await;
    let (broker, amqp_uri) = Proxy::before(&testkit::amqp_uri()).await;
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
    wait_until("each id is looked up", async || looked_up(&[&api]) == [1, 2, 3, 4, 5]).await;
    assert_eq!(env.rows().await, [0; 0]);
    database.restore();
    env.wait_until_recorded(1..=5).await;
    consumer.wait_until_missing(&[]).await;
    assert_eq!(looked_up(&[&api]), [1, 2, 3, 4, 5]);
    env.drain(consumer).await;
}

#[tokio::test]
async fn deliveries_that_waited_at_a_broker_outage_are_looked_up_once() {
    let env = TestEnv::new().await;
    let (broker, amqp_uri) = Proxy::before(&testkit::amqp_uri()).await;
    let (api, go) = StatusApi::gated();
    env.publish(1..=100).await;
    let amqp_uri = format!("--amqp-uri={amqp_uri}");
    let consumer = env.start(&api.endpoint(), &[&amqp_uri, "--max-consumers=3"]);
    wait_until("all are taken", async || api.in_flight() == 3 && env.ready().await == 0).await;
    broker.cut();
    consumer.wait_until_missing(&["broker", "broker, for retries"]).await;
    go.cancel();
    broker.restore();
    env.wait_until_recorded(1..=100).await;
    wait_until("all messages are settled", async || env.ready().await == 0).await;
    consumer.stop().await;
    // The three lookups that were in flight may be repeated.
    assert!(api.lookups().len() <= 103, "{} lookups", api.lookups().len());
}

#[tokio::test]
async fn a_broker_connection_lost_during_lookups_loses_no_id() {
    let (env, api) = TestEnv::with_answer(Answer::Online.after(SECOND / 2)).await;
    let (broker, amqp_uri) = Proxy::before(&testkit::amqp_uri()).await;
    env.publish(1..=20).await;
    let amqp_uri = format!("--amqp-uri={amqp_uri}");
    let consumer = env.start(&api.endpoint(), &[&amqp_uri, "--max-consumers=5"]);
    wait_until("lookups are in flight", async || api.in_flight() == 5).await;
    broker.cut();
    consumer.wait_until_missing(&["broker", "broker, for retries"]).await;
    broker.restore();
    env.wait_until_recorded(1..=20).await;
    consumer.wait_until_missing(&[]).await;
    consumer.stop().await;
    // Messages that were redelivered may still be in the queue; their objects are already recorded.
    assert_eq!((env.in_delay_queues().await, env.dead_letters().await), (0, 0));
}
