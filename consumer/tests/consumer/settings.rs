use std::time::Instant;

use runtime::CancellationToken;
use testkit::{Answer, Scratch, StatusApi, wait_until};
use tokio::time::sleep;

use crate::breaker::has_opened;
use crate::process::spawn;
use crate::{SECOND, SETTLE_TIME, TestEnv, looked_up};

async fn wait_until_in_flight(api: &StatusApi, count: usize) {
    wait_until(&format!("{count} lookups are in flight"), async || api.in_flight() == count).await;
}

/// Asserts that the number of lookups follows `MAX_CONSUMERS` up and down while lookups are in
/// flight.
async fn assert_lookups_follow(further: &[&str]) {
    let env = TestEnv::new().await;
    let gates: Vec<_> = (0..4).map(|_| CancellationToken::new()).collect();
    // Each gate blocks the lookups of 100 ids.
    let api = StatusApi::start({
        let gates = gates.clone();
        move |id, _| {
            let gate = gates[usize::try_from(id / 100).unwrap()].clone();
            Answer::Online.behind(&gate)
        }
    });
    let further: Vec<_> = further.iter().copied().chain(["--max-consumers=10"]).collect();
    let consumer = env.start(&api.endpoint(), &further);
    env.publish(0..400).await;
    wait_until_in_flight(&api, 10).await;
    consumer.change(&["--max-consumers=100"]);
    wait_until_in_flight(&api, 100).await;
    // Lookups in flight continue, and no further lookup starts until fewer than three are left.
    consumer.change(&["--max-consumers=3"]);
    sleep(SETTLE_TIME).await;
    assert_eq!(api.in_flight(), 100);
    gates[0].cancel();
    wait_until_in_flight(&api, 3).await;
    sleep(SETTLE_TIME).await;
    // The first gate let 100 lookups end, and then three started.
    assert_eq!((api.in_flight(), api.lookups().len()), (3, 103));
    // No permit was lost.
    consumer.change(&["--max-consumers=100"]);
    wait_until_in_flight(&api, 100).await;
    for gate in gates {
        gate.cancel();
    }
    env.wait_until_recorded(0..400).await;
    env.drain(consumer).await;
    assert_eq!(looked_up(&[&api]), (0..400).collect::<Vec<_>>());
}

#[tokio::test]
async fn lookups_follow_max_consumers_while_the_consumer_runs() {
    assert_lookups_follow(&[]).await;
}

#[tokio::test]
async fn without_coalescing_the_prefetch_follows_max_consumers_too() {
    assert_lookups_follow(&["--coalesce=off"]).await;
}

#[tokio::test]
async fn an_adaptive_limit_stays_below_a_max_consumers_that_falls() {
    let env = TestEnv::new().await;
    let (api, go) = StatusApi::gated();
    let settings = ["--max-consumers=40", "--concurrency=adaptive"];
    let consumer = env.start(&api.endpoint(), &settings);
    consumer.change(&["--max-consumers=7"]);
    env.publish(0..100).await;
    wait_until_in_flight(&api, 7).await;
    sleep(SETTLE_TIME).await;
    assert_eq!(api.in_flight(), 7);
    go.cancel();
    env.wait_until_recorded(0..100).await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn max_lookups_per_second_limits_lookups_until_it_is_raised() {
    let (env, api) = TestEnv::with_all_online().await;
    let started = Instant::now();
    let consumer = env.start(&api.endpoint(), &["--max-lookups-per-second=5"]);
    env.publish(0..500).await;
    wait_until("some are looked up", async || api.lookups().len() >= 5).await;
    let took = api.lookups()[4].1 - started;
    assert!(took > SECOND * 9 / 10, "five within {took:?}");
    // Without the change, the rest would take 98 s.
    consumer.change(&["--max-lookups-per-second=5000"]);
    env.wait_until_recorded(0..500).await;
    env.drain(consumer).await;
    assert_eq!(looked_up(&[&api]), (0..500).collect::<Vec<_>>());
}

#[tokio::test]
async fn breaker_failure_percent_can_change_at_run_time() {
    // For two of every three ids, the first lookup fails.
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, lookup| {
        if id % 3 == 0 || lookup > 1 { Answer::Online } else { Answer::Status(500) }
    });
    let consumer = env.start(&api.endpoint(), &["--max-consumers=10"]);
    let opened = has_opened(&consumer);
    env.publish(0..300).await;
    env.wait_until_recorded(0..300).await;
    assert!(!opened().await, "the breaker opened at two thirds");
    consumer.change(&["--breaker-failure-percent=50"]);
    env.publish(300..600).await;
    consumer.wait_until_missing(&["status API"]).await;
    env.wait_until_recorded(0..600).await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn lookups_after_a_change_have_the_new_status_timeout() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|_, lookup| if lookup == 1 { Answer::Hang } else { Answer::Online });
    let consumer = env.start(&api.endpoint(), &["--status-timeout=5m", "--max-consumers=1"]);
    env.publish([1]).await;
    wait_until_in_flight(&api, 1).await;
    env.publish([2]).await;
    consumer.change(&["--status-timeout=200ms", "--max-consumers=2"]);
    env.wait_until_recorded([2]).await;
    // The lookup of object 1 started before the change.
    assert_eq!((api.lookups_of(1), api.lookups_of(2)), (1, 2));
    consumer.run.abort();
}

/// Raises the limit during a backlog as an operator does: in the settings file of a process.
#[tokio::test]
async fn raising_max_consumers_during_a_backlog_redelivers_nothing() {
    let env = TestEnv::new().await;
    let (api, go) = StatusApi::gated();
    let directory = Scratch::new("settings");
    let file = directory.path().join("lastseen.env");
    std::fs::write(&file, "MAX_CONSUMERS=50\n").unwrap();
    env.publish(0..2_000).await;
    let path = file.to_str().unwrap();
    let consumer = spawn(
        &env,
        &api,
        &[("LASTSEEN_CONFIG", path), ("COALESCE", "off"), ("STATUS_TIMEOUT", "5m")],
    );
    wait_until_in_flight(&api, 50).await;
    std::fs::write(&file, "# A comment.\nMAX_CONSUMERS=500\n").unwrap();
    wait_until_in_flight(&api, 500).await;
    go.cancel();
    env.wait_until_recorded(0..2_000).await;
    let redelivered = consumer.metric("lastseen_deliveries_total{redelivered=\"true\"}").await;
    consumer.stop().await;
    env.assert_all_settled().await;
    assert!(redelivered.abs() < 0.5, "{redelivered} messages were redelivered");
    assert_eq!(looked_up(&[&api]), (0..2_000).collect::<Vec<_>>());
}
