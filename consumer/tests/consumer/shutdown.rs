use testbed::{Answer, StatusApi, eventually};

use crate::{PATIENCE, SECOND, Surroundings, looked_up};

#[tokio::test]
async fn a_stopped_consumer_finishes_what_it_has_begun_and_leaves_the_rest_to_others() {
    let around = Surroundings::new().await;
    // The first five are answered long after the stop.
    let api = StatusApi::start(|id, _| match id {
        1..=5 => Answer::After(SECOND * 3, Box::new(Answer::Online)),
        _ => Answer::Online,
    });
    around.publish(1..=30).await;
    let stopped = around.start(&api.endpoint(), &["--max-consumers=5"]);
    eventually("lookups are in flight", PATIENCE, async || (api.in_flight() == 5).then_some(()))
        .await;
    stopped.shutdown.cancel();
    eventually("the rest is given back at once", PATIENCE, async || {
        (around.waiting().await == 25).then_some(())
    })
    .await;
    assert_eq!(api.in_flight(), 5, "others need not wait for these");
    stopped.stop().await;
    assert_eq!(around.rows().await, [1, 2, 3, 4, 5]);
    assert_eq!(looked_up(&[&api]), [1, 2, 3, 4, 5]);
    assert_eq!(around.waiting().await, 25);

    let other = around.start(&api.endpoint(), &[]);
    around.recorded(1..=30).await;
    assert_eq!(looked_up(&[&api]), (1..=30).collect::<Vec<_>>());
    other.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn a_lookup_that_fails_during_the_drain_is_given_back_and_costs_no_attempt() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, lookup| match lookup {
        1 => Answer::After(SECOND, Box::new(Answer::Status(500))),
        _ => Answer::Online,
    });
    around.publish([42]).await;
    let consumer = around.start(&api.endpoint(), &["--max-attempts=1"]);
    eventually("the lookup is in flight", PATIENCE, async || (api.in_flight() == 1).then_some(()))
        .await;
    consumer.stop().await;
    assert_eq!(looked_up(&[&api]), [42]);
    assert_eq!((around.waiting().await, around.in_retry_queues().await), (1, 0));

    let other = around.start(&api.endpoint(), &[]);
    around.recorded([42]).await;
    other.stop().await;
    around.assert_all_settled().await;
}
