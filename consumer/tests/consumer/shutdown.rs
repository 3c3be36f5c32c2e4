use testbed::{Answer, StatusApi, eventually};

use crate::{PATIENCE, SECOND, TestEnv, looked_up};

#[tokio::test]
async fn a_stopped_consumer_finishes_lookups_and_gives_back_the_rest() {
    let env = TestEnv::new().await;
    // The first five are answered long after the stop.
    let api = StatusApi::start(|id, _| match id {
        1..=5 => Answer::After(SECOND * 3, Box::new(Answer::Online)),
        _ => Answer::Online,
    });
    env.publish(1..=30).await;
    let stopped = env.start(&api.endpoint(), &["--max-consumers=5"]);
    eventually("lookups are in flight", PATIENCE, async || (api.in_flight() == 5).then_some(()))
        .await;
    stopped.shutdown.cancel();
    eventually("the rest is given back at once", PATIENCE, async || {
        (env.ready().await == 25).then_some(())
    })
    .await;
    assert_eq!(api.in_flight(), 5, "the rest does not wait for the lookups in flight");
    stopped.stop().await;
    assert_eq!(env.rows().await, [1, 2, 3, 4, 5]);
    assert_eq!(looked_up(&[&api]), [1, 2, 3, 4, 5]);
    assert_eq!(env.ready().await, 25);

    let other = env.start(&api.endpoint(), &[]);
    env.wait_until_recorded(1..=30).await;
    assert_eq!(looked_up(&[&api]), (1..=30).collect::<Vec<_>>());
    other.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn a_lookup_that_fails_during_the_drain_costs_no_attempt() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|_, lookup| match lookup {
        1 => Answer::After(SECOND, Box::new(Answer::Status(500))),
        _ => Answer::Online,
    });
    env.publish([42]).await;
    let consumer = env.start(&api.endpoint(), &["--max-attempts=1"]);
    eventually("the lookup is in flight", PATIENCE, async || (api.in_flight() == 1).then_some(()))
        .await;
    consumer.stop().await;
    assert_eq!(looked_up(&[&api]), [42]);
    assert_eq!((env.ready().await, env.in_delay_queues().await), (1, 0));

    let other = env.start(&api.endpoint(), &[]);
    env.wait_until_recorded([42]).await;
    other.stop().await;
    env.assert_all_settled().await;
}
