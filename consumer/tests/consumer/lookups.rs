use std::time::Duration;

use service::CancellationToken;
use testbed::{Answer, StatusApi, eventually};

use crate::{PATIENCE, Surroundings, looked_up};

/// Of an API that bears whatever it is asked.
const LATENCY: Duration = Duration::from_millis(50);

#[tokio::test]
async fn who_is_online_gets_a_row_and_who_is_offline_or_unknown_gets_none() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|id, _| match id {
        1..=9 => Answer::Offline,
        10..=19 => Answer::Status(404),
        _ => Answer::Online,
    });
    let online = [i64::MIN, -7, 0, 42, i64::MAX];
    around.publish(online.into_iter().chain([1, 2, 3, 10, 11])).await;
    let consumer = around.start(&api.endpoint(), &[]);
    around.recorded(online).await;
    eventually("each id is looked up", PATIENCE, async || {
        (api.lookups().len() == 10).then_some(())
    })
    .await;
    consumer.stop().await;
    assert_eq!(around.rows().await, online);
    assert_eq!(looked_up(&[&api]).len(), 10, "no answer here is a reason to ask again");
    around.assert_all_settled().await;
}

#[tokio::test]
async fn a_message_of_the_go_producer_is_looked_up() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    let consumer = around.start(&api.endpoint(), &[]);
    around.queue.publish_raw(br#"{"ID":42}"#).await;
    around.recorded([42]).await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn as_many_lookups_as_allowed_run_at_once_and_never_more() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| {
        Answer::After(Duration::from_millis(200), Box::new(Answer::Online))
    });
    around.publish(1..=200).await;
    let consumer = around.start(&api.endpoint(), &["--max-consumers=20"]);
    around.recorded(1..=200).await;
    assert_eq!(api.peak_in_flight(), 20);
    consumer.stop().await;
}

#[tokio::test]
async fn an_adaptive_limit_begins_with_fifty_and_rises_while_the_api_bears_it() {
    let around = Surroundings::new().await;
    let answers = CancellationToken::new();
    let held = answers.clone();
    let api = StatusApi::start(move |_, _| {
        Answer::Once(held.clone(), Box::new(Answer::After(LATENCY, Box::new(Answer::Online))))
    });
    around.publish(1..=2_000).await;
    let settings = ["--max-consumers=200", "--concurrency=adaptive"];
    let consumer = around.start(&api.endpoint(), &settings);
    eventually("fifty are asked for", PATIENCE, async || (api.in_flight() == 50).then_some(()))
        .await;
    // As many as are delivered; that there are no more of them needs no time to pass, since all of them
    // are begun by the same loop as the first.
    eventually("the prefetch is taken", PATIENCE, async || {
        (around.queue.depth(&around.queue.name).await == Some(0)).then_some(())
    })
    .await;
    assert_eq!(api.peak_in_flight(), 50);
    answers.cancel();
    around.recorded(1..=2_000).await;
    assert!((51..=200).contains(&api.peak_in_flight()), "{}", api.peak_in_flight());
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn results_that_wait_for_their_write_take_no_lookups_place() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    around.publish(1..=4).await;
    // No write is due before this test has ended.
    let settings = ["--max-consumers=2", "--write-batch-linger=1m"];
    let _consumer = around.start(&api.endpoint(), &settings);
    eventually("twice as many are looked up as there are places", PATIENCE, async || {
        (looked_up(&[&api]) == [1, 2, 3, 4]).then_some(())
    })
    .await;
    assert_eq!(around.rows().await, [0; 0]);
}

#[tokio::test]
async fn two_consumers_share_a_queue_and_each_id_is_looked_up_once() {
    let around = Surroundings::new().await;
    let first_api = StatusApi::start(|_, _| {
        Answer::After(Duration::from_millis(500), Box::new(Answer::Online))
    });
    let second_api = StatusApi::start(|_, _| Answer::Online);
    around.publish(1..=200).await;
    let first = around.start(&first_api.endpoint(), &["--max-consumers=10", "--coalesce=off"]);
    eventually("the first consumer is busy", PATIENCE, async || {
        (first_api.in_flight() == 10).then_some(())
    })
    .await;
    // A first consumer that had taken the whole backlog would leave nothing for the second.
    let second = around.start(&second_api.endpoint(), &["--max-consumers=10", "--coalesce=off"]);
    around.recorded(1..=200).await;
    assert!(looked_up(&[&second_api]).len() > 20, "{}", looked_up(&[&second_api]).len());
    assert!(looked_up(&[&first_api]).len() >= 10, "{}", looked_up(&[&first_api]).len());
    assert_eq!(looked_up(&[&first_api, &second_api]), (1..=200).collect::<Vec<_>>());
    first.stop().await;
    second.stop().await;
    around.assert_all_settled().await;
}
