use std::time::Duration;

use testkit::{Answer, StatusApi, wait_until};
use tokio::time::timeout;

use crate::{SECOND, TestEnv, looked_up};

#[tokio::test]
async fn a_stopped_consumer_finishes_lookups_and_gives_back_the_rest() {
    // The first five are answered long after the stop.
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, _| match id {
        1..=5 => Answer::Online.after(SECOND * 3),
        _ => Answer::Online,
    });
    env.publish(1..=30).await;
    let stopped = env.start(&api.endpoint(), &["--max-consumers=5"]);
    wait_until("lookups are in flight", async || api.in_flight() == 5).await;
    stopped.shutdown.cancel();
    wait_until("the rest is given back at once", async || env.ready().await == 25).await;
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
        1 => Answer::Status(500).after(SECOND),
        _ => Answer::Online,
    });
    env.publish([42]).await;
    let consumer = env.start(&api.endpoint(), &["--max-attempts=1"]);
    wait_until("the lookup is in flight", async || api.in_flight() == 1).await;
    consumer.stop().await;
    assert_eq!(looked_up(&[&api]), [42]);
    assert_eq!((env.ready().await, env.in_delay_queues().await), (1, 0));

    let other = env.start(&api.endpoint(), &[]);
    env.wait_until_recorded([42]).await;
    other.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn critical_tasks_are_supervised_until_the_end() {
    let (env, api) = TestEnv::with_all_online().await;
    let consumer = env.start(&api.endpoint(), &[]);
    consumer.wait_until_missing(&[]).await;
    let tasks = [
        "batch writer",
        "breaker",
        "database monitor (consumer)",
        "event publisher (consumer: events)",
        "publisher (consumer: retries and dead letters)",
        "status API monitor",
    ];
    let supervisor = consumer.supervisor.clone();
    assert_eq!(supervisor.running(), tasks);
    consumer.stop().await;
    assert!(
        timeout(Duration::ZERO, supervisor.failure()).await.is_err(),
        "the supervisor reports a failure after a clean end"
    );
}
