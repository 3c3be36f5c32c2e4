use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use runtime::Health;
use testkit::{Answer, StatusApi, wait_for, wait_until};
use tokio::task::JoinHandle;

use crate::{RunningConsumer, SECOND, TestEnv, looked_up, lookup_times};

/// With this setting, the first attempt that counts makes a dead letter.
const ONE_ATTEMPT: &str = "--max-attempts=1";

fn is_open(health: &Health) -> bool {
    health.missing().iter().any(|(dependency, reason)| {
        *dependency == "status API" && reason.contains("nearly all lookups fail")
    })
}

async fn wait_until_open(consumer: &RunningConsumer) {
    wait_until("the breaker opens", async || is_open(&consumer.health)).await;
}

/// Begins to watch the breaker. The returned function ends that, and returns whether the breaker
/// has opened meanwhile.
pub(crate) fn has_opened(consumer: &RunningConsumer) -> impl AsyncFnOnce() -> bool + use<> {
    let (health, ended) = (consumer.health.clone(), Arc::new(AtomicBool::new(false)));
    let until = Arc::clone(&ended);
    let watching: JoinHandle<bool> = tokio::spawn(async move {
        let mut opened = false;
        while !until.load(Ordering::SeqCst) {
            opened |= is_open(&health);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        opened
    });
    async move || {
        ended.store(true, Ordering::SeqCst);
        watching.await.unwrap()
    }
}

/// Asserts that an outage costs no attempt, although it lasts for many probes. With these settings,
/// deliveries are held for only 3 s, so messages also return to the queue meanwhile.
async fn assert_outage_costs_no_attempt(while_away: Answer) {
    let (env, api) = TestEnv::with_answer(while_away).await;
    let settings = ["--max-consumers=10", ONE_ATTEMPT, "--status-timeout=500ms"];
    env.publish(1..=100).await;
    let consumer = env.start(&api.endpoint(), &settings);
    wait_until_open(&consumer).await;
    let opened_at = Instant::now();
    let before = api.lookups().len();
    wait_until("many probes", async || api.lookups().len() > before + 15).await;
    // Not all of the 15 are probes: some lookups were in flight when the breaker opened.
    assert!(opened_at.elapsed() > SECOND * 2, "15 probes in {:?}", opened_at.elapsed());
    assert_eq!((env.in_delay_queues().await, env.dead_letters().await), (0, 0));

    api.set_behaviour(|_, _| Answer::Online);
    let recovered_at = Instant::now();
    env.wait_until_recorded(1..=100).await;
    assert!(recovered_at.elapsed() < SECOND * 10, "{:?} to recover", recovered_at.elapsed());
    consumer.wait_until_missing(&[]).await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn a_long_outage_of_the_api_costs_no_attempt() {
    assert_outage_costs_no_attempt(Answer::Status(500)).await;
}

#[tokio::test]
async fn an_api_that_hangs_for_long_costs_no_attempt() {
    assert_outage_costs_no_attempt(Answer::Hang).await;
}

#[tokio::test]
async fn held_deliveries_are_requeued_so_that_others_get_a_lookup() {
    let (env, api) = TestEnv::with_answer(Answer::Status(500)).await;
    env.publish(1..=12).await;
    // At most four deliveries (twice MAX_CONSUMERS) are held at a time, each for 3 s (six times
    // STATUS_TIMEOUT).
    let settings = ["--max-consumers=2", ONE_ATTEMPT, "--status-timeout=500ms"];
    let consumer = env.start(&api.endpoint(), &settings);
    wait_until("each id is looked up", async || (1..=12).all(|id| api.lookups_of(id) > 0)).await;
    consumer.stop().await;
    assert_eq!((env.in_delay_queues().await, env.dead_letters().await), (0, 0));
    assert_eq!(env.ready().await, 12);
}

#[tokio::test]
async fn other_ids_are_not_delayed_when_half_of_the_ids_fail() {
    // Different latencies, so that the permits are not all released at the same time.
    let latency = |id: i64| Duration::from_millis(500 + id.unsigned_abs() * 37 % 1_000);
    let env = TestEnv::new().await;
    let api = StatusApi::start(move |id, _| match id % 2 {
        0 => Answer::Status(500),
        _ => Answer::Online.after(latency(id)),
    });
    env.publish(1..=250).await;
    // More ids follow; otherwise, only those that fail would be left at the end.
    env.publish((1_001..=1_201).step_by(2)).await;
    let consumer = env.start(&api.endpoint(), &["--max-consumers=25"]);
    let has_opened = has_opened(&consumer);
    let recorded = async || env.rows().await.iter().filter(|id| **id <= 250).count();
    wait_until("the others are recorded", async || recorded().await == 125).await;
    assert!(!has_opened().await, "the breaker opened");
    let lookups = api.lookups();
    let others: Vec<Instant> =
        lookups.iter().filter(|(id, _)| id % 2 == 1 && *id <= 250).map(|(_, at)| *at).collect();
    assert_eq!(others.len(), 125, "each is looked up once");
    let took = others[124] - others[0];
    let least = (1..=250).step_by(2).map(latency).sum::<Duration>() / 25;
    // Allow twice the time, because the machine may be busy; the fault suite measures the delay.
    assert!(took < least * 2, "{took:?}, but {least:?} without failures");
    // The messages whose lookup failed wait for their retry.
    assert!(env.in_delay_queues().await > 0);
    consumer.stop().await;
}

#[tokio::test]
async fn isolated_failures_count_and_do_not_open_the_breaker() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, lookup| match (id % 10, lookup) {
        (5, 1) => Answer::Status(500),
        _ => Answer::Online.after(Duration::from_millis(20)),
    });
    env.publish(1..=300).await;
    let consumer = env.start(&api.endpoint(), &["--max-consumers=10"]);
    let has_opened = has_opened(&consumer);
    wait_until("some wait for their retry", async || env.in_delay_queues().await > 5).await;
    env.wait_until_recorded(1..=300).await;
    assert!(!has_opened().await, "the breaker opened");
    env.drain(consumer).await;
}

#[tokio::test]
async fn the_number_of_lookups_rises_gradually_after_an_outage() {
    const LATENCY: Duration = Duration::from_millis(500);
    let env = TestEnv::new().await;
    let (recovered, started) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let api = StatusApi::start({
        let (recovered, started) = (Arc::clone(&recovered), Arc::clone(&started));
        move |_, _| {
            if !recovered.load(Ordering::SeqCst) {
                return Answer::Status(500);
            }
            started.lock().push(Instant::now());
            Answer::Online.after(LATENCY)
        }
    });
    env.publish(1..=300).await;
    let consumer = env.start(&api.endpoint(), &["--max-consumers=100"]);
    wait_until_open(&consumer).await;
    // Lookups that started before the breaker opened may still be on their way to the API.
    wait_for("only probes arrive", async || {
        let times: Vec<Instant> = api.lookups().iter().map(|(_, at)| *at).collect();
        let [.., before, last] = times.as_slice() else { return None };
        (*last - *before > LATENCY).then_some(())
    })
    .await;
    recovered.store(true, Ordering::SeqCst);
    env.wait_until_recorded(1..=300).await;
    let started = started.lock().clone();
    let within = |limit| started.iter().filter(|at| **at - started[0] < limit).count();
    // Up to five probes start before the first answer. Each answer to a probe lets eight lookups
    // start: one in place of the probe, and seven because the limit rises.
    assert!(within(LATENCY) <= 5, "{} lookups before the first answer", within(LATENCY));
    assert!(within(LATENCY * 2) <= 45, "{} lookups within two latencies", within(LATENCY * 2));
    assert!(api.max_in_flight() > 50, "the number of lookups did not rise");
    env.drain(consumer).await;
}

#[tokio::test]
async fn a_429_pauses_all_lookups_and_costs_no_attempt() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, lookup| match (id, lookup) {
        (20, 1) => Answer::StatusWithHeader(429, "retry-after", "3".to_owned()),
        _ => Answer::Online.after(SECOND / 10),
    });
    env.publish(1..=200).await;
    let settings = ["--max-consumers=5", ONE_ATTEMPT];
    let consumer = env.start(&api.endpoint(), &settings);
    env.wait_until_recorded(1..=200).await;
    let asked_to_wait = lookup_times(&api, 20)[0];
    let since = |at: Instant| at.saturating_duration_since(asked_to_wait);
    let times: Vec<Duration> = api.lookups().iter().map(|(_, at)| since(*at)).collect();
    // Lookups that started before the consumer received the 429 may arrive within half a second.
    let is_in_pause = |time: &&Duration| **time > SECOND / 2 && **time < SECOND * 3;
    assert_eq!(times.iter().filter(is_in_pause).count(), 0, "lookups during the pause");
    assert!(times.iter().any(|time| *time >= SECOND * 3));
    env.drain(consumer).await;
}

#[tokio::test]
async fn a_503_with_a_retry_after_date_pauses_all_lookups() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|_, lookup| match lookup {
        // The date has no fraction of a second, so the pause is at least 3 s long.
        1 => Answer::StatusWithHeader(
            503,
            "retry-after",
            httpdate::fmt_http_date(SystemTime::now() + SECOND * 4),
        ),
        _ => Answer::Online,
    });
    env.publish([1]).await;
    let consumer = env.start(&api.endpoint(), &[ONE_ATTEMPT]);
    wait_until("the first object is looked up", async || !api.lookups().is_empty()).await;
    env.publish([2]).await;
    env.wait_until_recorded([1, 2]).await;
    let first = api.lookups()[0].1;
    assert!(api.lookups()[1..].iter().all(|(_, at)| *at - first >= SECOND * 2));
    consumer.stop().await;
    assert!(looked_up(&[&api]).len() >= 3);
    env.assert_all_settled().await;
}
