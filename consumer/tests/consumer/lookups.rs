use std::time::Duration;

use runtime::CancellationToken;
use testkit::{Answer, StatusApi, wait_until};

use crate::{TestEnv, looked_up};

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
    wait_until("each id is looked up", async || api.lookups().len() == 10).await;
    consumer.stop().await;
    assert_eq!(env.rows().await, online);
    assert_eq!(looked_up(&[&api]).len(), 10, "each of these answers is final");
    env.assert_all_settled().await;
}

#[tokio::test]
async fn a_message_of_the_go_producer_is_looked_up() {
    let (env, api) = TestEnv::with_all_online().await;
    let consumer = env.start(&api.endpoint(), &[]);
    env.queue.publish_raw(br#"{"ID":42}"#).await;
    env.wait_until_recorded([42]).await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn lookups_in_flight_reach_max_consumers_and_never_exceed_it() {
    let (env, api) = TestEnv::with_answer(Answer::Online.after(Duration::from_millis(200))).await;
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
    let api = StatusApi::start(move |_, _| Answer::Online.after(LATENCY).behind(&held));
    env.publish(1..=2_000).await;
    let settings = ["--max-consumers=200", "--concurrency=adaptive"];
    let consumer = env.start(&api.endpoint(), &settings);
    wait_until("fifty lookups are in flight", async || api.in_flight() == 50).await;
    // The scheduler starts lookups in the loop that takes the deliveries. So once it has taken as
    // many as the prefetch allows, it has also started every lookup that it would start.
    wait_until("the prefetch is taken", async || env.queue.depth(&env.queue.name).await == Some(0))
        .await;
    assert_eq!(api.max_in_flight(), 50);
    answers.cancel();
    env.wait_until_recorded(1..=2_000).await;
    assert!((51..=200).contains(&api.max_in_flight()), "{}", api.max_in_flight());
    env.drain(consumer).await;
}

#[tokio::test]
async fn results_that_wait_for_their_write_hold_no_lookup_permit() {
    let (env, api) = TestEnv::with_all_online().await;
    env.publish(1..=4).await;
    // No write is due before the end of this test.
    let settings = ["--max-consumers=2", "--write-batch-linger=1m"];
    let _consumer = env.start(&api.endpoint(), &settings);
    wait_until("twice MAX_CONSUMERS ids are looked up", async || {
        looked_up(&[&api]) == [1, 2, 3, 4]
    })
    .await;
    assert_eq!(env.rows().await, [0; 0]);
}

#[tokio::test]
async fn two_consumers_share_a_queue_and_each_id_is_looked_up_once() {
    let env = TestEnv::new().await;
    let first_api = StatusApi::start(|_, _| Answer::Online.after(Duration::from_millis(500)));
    let second_api = StatusApi::start(|_, _| Answer::Online);
    env.publish(1..=200).await;
    let first = env.start(&first_api.endpoint(), &["--max-consumers=10", "--coalesce=off"]);
    wait_until("the first consumer is busy", async || first_api.in_flight() == 10).await;
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
