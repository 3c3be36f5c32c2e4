use service::CancellationToken;
use testbed::{Answer, StatusApi, eventually, free_port};
use tokio::time::timeout;

use crate::{A_WHILE, PATIENCE, SECOND, Surroundings, looked_up, proxied};

/// Waits until `lookups` ids have been looked up and `waiting` are left in the queue, and fails if
/// it does not stay at that.
async fn intake_stops(around: &Surroundings, api: &StatusApi, lookups: usize, waiting: u32) {
    eventually("the intake has stopped", PATIENCE, async || {
        (api.lookups().len() == lookups && around.waiting().await == waiting).then_some(())
    })
    .await;
    let going_on = eventually("the intake goes on", PATIENCE, async || {
        (api.lookups().len() != lookups || around.waiting().await != waiting).then_some(())
    });
    assert!(timeout(A_WHILE, going_on).await.is_err(), "{} lookups", api.lookups().len());
}

#[tokio::test]
async fn without_a_database_results_wait_and_nothing_is_looked_up_twice_for_it() {
    let around = Surroundings::new().await;
    let (proxy, database) = around.database_proxy().await;
    proxy.cut();
    let api = StatusApi::start(|_, _| Answer::Online);
    around.publish(1..=50).await;
    let consumer = around.start(&api.endpoint(), &[&database, "--max-consumers=5"]);
    // Five lookups, and as many results that wait for their write.
    intake_stops(&around, &api, 10, 0).await;
    consumer.misses(&["database"]).await;

    proxy.restore();
    around.recorded(1..=50).await;
    assert_eq!(looked_up(&[&api]), (1..=50).collect::<Vec<_>>());
    consumer.misses(&[]).await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn a_database_that_goes_away_during_lookups_costs_no_result_and_no_second_lookup() {
    let around = Surroundings::new().await;
    let (proxy, database) = around.database_proxy().await;
    // The first five are answered long after the cut.
    let api = StatusApi::start(|id, _| match id {
        1..=5 => Answer::After(SECOND * 2, Box::new(Answer::Online)),
        _ => Answer::Online,
    });
    let settings = [&database, "--max-consumers=5", "--write-batch-max=2"];
    let consumer = around.start(&api.endpoint(), &settings);
    around.migrated().await;
    around.publish(1..=30).await;
    eventually("lookups are in flight", PATIENCE, async || (api.in_flight() == 5).then_some(()))
        .await;
    proxy.cut();
    // Five lookups, and one batch of two that waits for its write.
    intake_stops(&around, &api, 7, 0).await;
    consumer.misses(&["database"]).await;

    proxy.restore();
    around.recorded(1..=30).await;
    assert_eq!(looked_up(&[&api]), (1..=30).collect::<Vec<_>>());
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn what_is_not_committed_is_not_acknowledged() {
    let around = Surroundings::new().await;
    let (proxy, database) = around.database_proxy().await;
    proxy.cut();
    let api = StatusApi::start(|_, _| Answer::Online);
    around.publish(1..=5).await;
    let consumer = around.start(&api.endpoint(), &[&database]);
    intake_stops(&around, &api, 5, 0).await;
    consumer.run.abort();
    eventually("all are back in the queue", PATIENCE, async || {
        (around.waiting().await == 5).then_some(())
    })
    .await;
    let consumer = around.start(&api.endpoint(), &[]);
    around.recorded(1..=5).await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn a_status_api_that_was_away_is_asked_again_when_it_is_back() {
    let around = Surroundings::new().await;
    let mut api = StatusApi::start(|_, _| Answer::Online);
    let consumer = around.start(&api.endpoint(), &[]);
    around.publish([1]).await;
    around.recorded([1]).await;
    consumer.misses(&[]).await;

    api.stop();
    around.publish(2..=5).await;
    consumer.misses(&["status API"]).await;
    eventually("all are taken", PATIENCE, async || (around.waiting().await == 0).then_some(()))
        .await;
    let _api = StatusApi::start_on(api.address(), |_, _| Answer::Online);
    around.recorded(1..=5).await;
    consumer.misses(&[]).await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn a_table_that_was_dropped_comes_back_and_what_was_waiting_is_written() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    let consumer = around.start(&api.endpoint(), &["--max-attempts=1"]);
    around.publish([1]).await;
    around.recorded([1]).await;
    sqlx::query("DROP TABLE object").execute(around.database.pool()).await.unwrap();
    around.publish(2..=50).await;
    around.recorded(2..=50).await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn without_any_peer_the_consumer_names_them_all_and_goes_on() {
    let around = Surroundings::new().await;
    let amqp_uri = format!("--amqp-uri=amqp://guest:guest@127.0.0.1:{}/%2f", free_port());
    let database = format!("--database-url=postgres://nobody@127.0.0.1:{}/x", free_port());
    let status_api = format!("http://127.0.0.1:{}", free_port());
    let consumer = around.start(&status_api, &[&amqp_uri, &database]);
    let all = ["broker", "broker, for retries", "database", "status API"];
    eventually("each peer was tried and refused", PATIENCE, async || {
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
async fn peers_may_come_in_any_order_after_the_consumer() {
    let around = Surroundings::new().await;
    let (broker, amqp_uri) = proxied(&testbed::amqp_uri(), 5672).await;
    let (database, database_url) = around.database_proxy().await;
    broker.cut();
    database.cut();
    let status_api = ([127, 0, 0, 1], free_port()).into();
    around.publish(1..=5).await;
    let settings = [format!("--amqp-uri={amqp_uri}"), database_url];
    let consumer = around.start(&format!("http://{status_api}"), &[&settings[0], &settings[1]]);
    consumer.misses(&["broker", "broker, for retries", "database", "status API"]).await;

    broker.restore();
    consumer.misses(&["database", "status API"]).await;
    let api = StatusApi::start_on(status_api, |_, _| Answer::Online);
    consumer.misses(&["database"]).await;
    eventually("each id is looked up", PATIENCE, async || {
        (looked_up(&[&api]) == [1, 2, 3, 4, 5]).then_some(())
    })
    .await;
    assert_eq!(around.rows().await, [0; 0]);
    database.restore();
    around.recorded(1..=5).await;
    consumer.misses(&[]).await;
    assert_eq!(looked_up(&[&api]), [1, 2, 3, 4, 5]);
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn what_waited_when_the_broker_connection_broke_is_looked_up_once() {
    let around = Surroundings::new().await;
    let (broker, amqp_uri) = proxied(&testbed::amqp_uri(), 5672).await;
    let go = CancellationToken::new();
    let noticed = go.clone();
    let api = StatusApi::start(move |_, _| Answer::Once(noticed.clone(), Box::new(Answer::Online)));
    around.publish(1..=100).await;
    let amqp_uri = format!("--amqp-uri={amqp_uri}");
    let consumer = around.start(&api.endpoint(), &[&amqp_uri, "--max-consumers=3"]);
    eventually("all are taken", PATIENCE, async || {
        (api.in_flight() == 3 && around.waiting().await == 0).then_some(())
    })
    .await;
    broker.cut();
    consumer.misses(&["broker", "broker, for retries"]).await;
    go.cancel();
    broker.restore();
    around.recorded(1..=100).await;
    eventually("all is settled", PATIENCE, async || (around.waiting().await == 0).then_some(()))
        .await;
    consumer.stop().await;
    // The three that were in flight are not known to be done.
    assert!(api.lookups().len() <= 103, "{} lookups", api.lookups().len());
}

#[tokio::test]
async fn a_broker_connection_that_breaks_during_lookups_costs_no_id() {
    let around = Surroundings::new().await;
    let (broker, amqp_uri) = proxied(&testbed::amqp_uri(), 5672).await;
    let api = StatusApi::start(|_, _| Answer::After(SECOND / 2, Box::new(Answer::Online)));
    around.publish(1..=20).await;
    let amqp_uri = format!("--amqp-uri={amqp_uri}");
    let consumer = around.start(&api.endpoint(), &[&amqp_uri, "--max-consumers=5"]);
    eventually("lookups are in flight", PATIENCE, async || (api.in_flight() == 5).then_some(()))
        .await;
    broker.cut();
    consumer.misses(&["broker", "broker, for retries"]).await;
    broker.restore();
    around.recorded(1..=20).await;
    consumer.misses(&[]).await;
    consumer.stop().await;
    // Some may have been delivered again and still wait: their effect was there before.
    assert_eq!((around.in_retry_queues().await, around.dead().await), (0, 0));
}
