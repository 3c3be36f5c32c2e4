use std::time::Instant;

use service::CancellationToken;
use testbed::{Answer, Scratch, StatusApi, eventually};
use tokio::time::sleep;

use crate::breaker::has_opened;
use crate::process::spawn;
use crate::{A_WHILE, PATIENCE, SECOND, Surroundings, looked_up};

/// An API that answers nobody until the token is cancelled.
fn held_up() -> (StatusApi, CancellationToken) {
    let token = CancellationToken::new();
    let go = token.clone();
    (StatusApi::start(move |_, _| Answer::Once(go.clone(), Box::new(Answer::Online))), token)
}

async fn in_flight(api: &StatusApi, count: usize) {
    eventually(&format!("{count} are looked up"), PATIENCE, async || {
        (api.in_flight() == count).then_some(())
    })
    .await;
}

/// The number of lookups follows `MAX_CONSUMERS` up and down, while lookups run that were begun before.
async fn lookups_follow(further: &[&str]) {
    let around = Surroundings::new().await;
    let gates: Vec<_> = (0..4).map(|_| CancellationToken::new()).collect();
    // Of 100 ids each.
    let api = StatusApi::start({
        let gates = gates.clone();
        move |id, _| {
            let gate = gates[usize::try_from(id / 100).unwrap()].clone();
            Answer::Once(gate, Box::new(Answer::Online))
        }
    });
    let further: Vec<_> = further.iter().copied().chain(["--max-consumers=10"]).collect();
    let consumer = around.start(&api.endpoint(), &further);
    around.publish(0..400).await;
    in_flight(&api, 10).await;
    consumer.change(&["--max-consumers=100"]);
    in_flight(&api, 100).await;
    // Those that run go on, and none begins before there are fewer than three.
    consumer.change(&["--max-consumers=3"]);
    sleep(A_WHILE).await;
    assert_eq!(api.in_flight(), 100);
    gates[0].cancel();
    in_flight(&api, 3).await;
    sleep(A_WHILE).await;
    assert_eq!((api.in_flight(), api.lookups().len()), (3, 103));
    // No permit was lost on the way.
    consumer.change(&["--max-consumers=100"]);
    in_flight(&api, 100).await;
    for gate in gates {
        gate.cancel();
    }
    around.recorded(0..400).await;
    consumer.stop().await;
    around.assert_all_settled().await;
    assert_eq!(looked_up(&[&api]), (0..400).collect::<Vec<_>>());
}

#[tokio::test]
async fn lookups_follow_max_consumers_while_the_consumer_runs() {
    lookups_follow(&[]).await;
}

#[tokio::test]
async fn without_coalescing_lookups_follow_max_consumers_by_a_prefetch_that_does() {
    lookups_follow(&["--coalesce=off"]).await;
}

#[tokio::test]
async fn an_adaptive_limit_stays_below_a_max_consumers_that_falls() {
    let around = Surroundings::new().await;
    let (api, go) = held_up();
    let settings = ["--max-consumers=40", "--concurrency=adaptive"];
    let consumer = around.start(&api.endpoint(), &settings);
    consumer.change(&["--max-consumers=7"]);
    around.publish(0..100).await;
    in_flight(&api, 7).await;
    sleep(A_WHILE).await;
    assert_eq!(api.in_flight(), 7);
    go.cancel();
    around.recorded(0..100).await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn no_more_lookups_begin_in_a_second_than_may_until_more_may() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    let started = Instant::now();
    let consumer = around.start(&api.endpoint(), &["--max-lookups-per-second=5"]);
    around.publish(0..500).await;
    eventually("some are looked up", PATIENCE, async || (api.lookups().len() >= 5).then_some(()))
        .await;
    let took = api.lookups()[4].1 - started;
    assert!(took > SECOND * 9 / 10, "five within {took:?}");
    // The rest would take 98 s.
    consumer.change(&["--max-lookups-per-second=5000"]);
    around.recorded(0..500).await;
    consumer.stop().await;
    around.assert_all_settled().await;
    assert_eq!(looked_up(&[&api]), (0..500).collect::<Vec<_>>());
}

#[tokio::test]
async fn how_many_failures_make_the_status_api_count_as_away_may_change_while_the_consumer_runs() {
    let around = Surroundings::new().await;
    // Two of three fail at first.
    let api = StatusApi::start(|id, lookup| {
        if id % 3 == 0 || lookup > 1 { Answer::Online } else { Answer::Status(500) }
    });
    let consumer = around.start(&api.endpoint(), &["--max-consumers=10"]);
    let opened = has_opened(&consumer);
    around.publish(0..300).await;
    around.recorded(0..300).await;
    assert!(!opened().await, "it has opened by two thirds");
    consumer.change(&["--breaker-failure-percent=50"]);
    around.publish(300..600).await;
    consumer.misses(&["status API"]).await;
    around.recorded(0..600).await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn lookups_that_begin_after_a_change_have_the_new_status_timeout() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, lookup| if lookup == 1 { Answer::Hang } else { Answer::Online });
    let consumer = around.start(&api.endpoint(), &["--status-timeout=5m", "--max-consumers=1"]);
    around.publish([1]).await;
    in_flight(&api, 1).await;
    around.publish([2]).await;
    consumer.change(&["--status-timeout=200ms", "--max-consumers=2"]);
    around.recorded([2]).await;
    // Object 1's lookup began before.
    assert_eq!((api.lookups_of(1), api.lookups_of(2)), (1, 2));
    consumer.run.abort();
}

/// What an operator does: more lookups in the midst of a backlog, by the settings file of a process.
#[tokio::test]
async fn max_consumers_raised_in_the_settings_file_during_a_backlog_redelivers_nothing() {
    let around = Surroundings::new().await;
    let (api, go) = held_up();
    let directory = Scratch::new("settings");
    let file = directory.path().join("lastseen.env");
    std::fs::write(&file, "MAX_CONSUMERS=50\n").unwrap();
    around.publish(0..2_000).await;
    let path = file.to_str().unwrap();
    let consumer = spawn(
        &around,
        &api,
        &[("LASTSEEN_CONFIG", path), ("COALESCE", "off"), ("STATUS_TIMEOUT", "5m")],
    );
    in_flight(&api, 50).await;
    std::fs::write(&file, "# More of them.\nMAX_CONSUMERS=500\n").unwrap();
    in_flight(&api, 500).await;
    go.cancel();
    around.recorded(0..2_000).await;
    let redelivered = consumer.metric("lastseen_deliveries_total{redelivered=\"true\"}").await;
    consumer.terminate();
    assert_eq!(consumer.wait().await.code(), Some(0));
    around.assert_all_settled().await;
    assert!(redelivered.abs() < 0.5, "{redelivered} were");
    assert_eq!(looked_up(&[&api]), (0..2_000).collect::<Vec<_>>());
}
