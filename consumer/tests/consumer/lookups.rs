use std::time::Duration;

use service::CancellationToken;
use testbed::{Answer, StatusApi, eventually};

use crate::{PATIENCE, TestEnv, looked_up};

/// The latency of an API that sustains any load.
const LATENCY: Duration = Duration::from_millis(50);

#[tokio::test]
async fn only_online_objects_get_a_row() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, _| match id {
        1..=9 => Answer::Offline,
        10..=19 => Answer::Status(404),
        _ => Answer::Online,
    });
    let online = [i64::MIN, -7, 0, 42, i64::MAX];
    env.publish(online.into_iter().chain([1, 2, 3, 10, 11])).await;
    let consumer = env.start(&api.endpoint(), &[]);
    env.wait_until_recorded(online).await;
    eventually("each id is looked up", PATIENCE, async || {
        (api.lookups().len() == 10).then_some(())
    })
    .await;
    consumer.stop().await;
    assert_eq!(env.rows().await, online);
    assert_eq!(looked_up(&[&api]).len(), 10, "each of these answers is final");
    env.assert_all_settled().await;
}

#[tokio::test]
async fn a_message_of_the_go_producer_is_looked_up() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    let consumer = env.start(&api.endpoint(), &[]);
    env.queue.publish_raw(br#"{"ID":42}"#).await;
    env.wait_until_recorded([42]).await;
    consumer.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn max_consumers_lookups_are_in_flight_and_never_more() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|_, _| {
        Answer::After(Duration::from_millis(200), Box::new(Answer::Online))
    });
    env.publish(1..=200).await;
    let consumer = env.start(&api.endpoint(), &["--max-consumers=20"]);
    env.wait_until_recorded(1..=200).await;
    assert_eq!(api.max_in_flight(), 20);
    consumer.stop().await;
}

#[tokio::test]
async fn an_adaptive_limit_starts_at_fifty_and_rises() {
    let env = TestEnv::new().await;
    let answers = CancellationToken::new();
    let held = answers.clone();
    let api = StatusApi::start(move |_, _| {
        Answer::Gated(held.clone(), Box::new(Answer::After(LATENCY, Box::new(Answer::Online))))
    });
    env.publish(1..=2_000).await;
    let settings = ["--max-consumers=200", "--concurrency=adaptive"];
    let consumer = env.start(&api.endpoint(), &settings);
    eventually("fifty lookups are in flight", PATIENCE, async || {
        (api.in_flight() == 50).then_some(())
    })
    .await;
    // By now, the scheduler has started all lookups that it would start, because it starts them in
    // the loop that takes the deliveries.
    eventually("the prefetch is taken", PATIENCE, async || {
        (env.queue.depth(&env.queue.name).await == Some(0)).then_some(())
    })
    .await;
    assert_eq!(api.max_in_flight(), 50);
    answers.cancel();
    env.wait_until_recorded(1..=2_000).await;
    assert!((51..=200).contains(&api.max_in_flight()), "{}", api.max_in_flight());
    consumer.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn results_that_wait_for_their_write_hold_no_lookup_permit() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    env.publish(1..=4).await;
    // No write is due before the end of this test.
    let settings = ["--max-consumers=2", "--write-batch-linger=1m"];
    let _consumer = env.start(&api.endpoint(), &settings);
    eventually("twice MAX_CONSUMERS ids are looked up", PATIENCE, async || {
        (looked_up(&[&api]) == [1, 2, 3, 4]).then_some(())
    })
    .await;
    assert_eq!(env.rows().await, [0; 0]);
}

#[tokio::test]
async fn two_consumers_share_a_queue_and_each_id_is_looked_up_once() {
    let env = TestEnv::new().await;
    let first_api = StatusApi::start(|_, _| {
        Answer::After(Duration::from_millis(500), Box::new(Answer::Online))
    });
    let second_api = StatusApi::start(|_, _| Answer::Online);
    env.publish(1..=200).await;
    let first = env.start(&first_api.endpoint(), &["--max-consumers=10", "--coalesce=off"]);
    eventually("the first consumer is busy", PATIENCE, async || {
        (first_api.in_flight() == 10).then_some(())
    })
    .await;
    // If the first consumer had taken the whole backlog, the second one would have no messages.
    let second = env.start(&second_api.endpoint(), &["--max-consumers=10", "--coalesce=off"]);
    env.wait_until_recorded(1..=200).await;
    assert!(looked_up(&[&second_api]).len() > 20, "{}", looked_up(&[&second_api]).len());
    assert!(looked_up(&[&first_api]).len() >= 10, "{}", looked_up(&[&first_api]).len());
    assert_eq!(looked_up(&[&first_api, &second_api]), (1..=200).collect::<Vec<_>>());
    first.stop().await;
    second.stop().await;
    env.assert_all_settled().await;
}
