use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use service::Health;
use testbed::{Answer, StatusApi, eventually};
use tokio::task::JoinHandle;

use crate::{PATIENCE, Running, SECOND, Surroundings, looked_up, times_of};

/// With it, a single attempt that counts makes a dead letter.
const NO_ATTEMPT_TO_SPEND: &str = "--max-attempts=1";

/// An API that fails for everybody until it is told that it is well.
fn ailing(while_ailing: Answer, once_well: Answer) -> (StatusApi, impl Fn()) {
    let well = Arc::new(AtomicBool::new(false));
    let is_well = Arc::clone(&well);
    let api = StatusApi::start(move |_, _| {
        if is_well.load(Ordering::SeqCst) { once_well.clone() } else { while_ailing.clone() }
    });
    (api, move || well.store(true, Ordering::SeqCst))
}

fn is_open(health: &Health) -> bool {
    health
        .missing()
        .iter()
        .any(|(peer, reason)| *peer == "status API" && reason.contains("nearly all lookups fail"))
}

async fn opened(consumer: &Running) {
    eventually("it opens", PATIENCE, async || is_open(&consumer.health).then_some(())).await;
}

/// Watches whether it opens, until it is asked.
pub(crate) fn has_opened(consumer: &Running) -> impl AsyncFnOnce() -> bool + use<> {
    let (health, asked) = (consumer.health.clone(), Arc::new(AtomicBool::new(false)));
    let until = Arc::clone(&asked);
    let watching: JoinHandle<bool> = tokio::spawn(async move {
        let mut opened = false;
        while !until.load(Ordering::SeqCst) {
            opened |= is_open(&health);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        opened
    });
    async move || {
        asked.store(true, Ordering::SeqCst);
        watching.await.unwrap()
    }
}

/// Through many rounds of probes; the settings make each message go round through the queue as well.
async fn an_api_that_is_away_costs_nothing(while_away: Answer) {
    let around = Surroundings::new().await;
    let (api, gets_well) = ailing(while_away, Answer::Online);
    let settings = ["--max-consumers=10", NO_ATTEMPT_TO_SPEND, "--status-timeout=500ms"];
    around.publish(1..=100).await;
    let consumer = around.start(&api.endpoint(), &settings);
    opened(&consumer).await;
    let opened_at = Instant::now();
    let before = api.lookups().len();
    eventually("many probes", PATIENCE, async || (api.lookups().len() > before + 15).then_some(()))
        .await;
    // With the lookups that were under way, and those that wait for their answers.
    assert!(opened_at.elapsed() > SECOND * 2, "15 probes in {:?}", opened_at.elapsed());
    assert_eq!((around.in_retry_queues().await, around.dead().await), (0, 0));

    gets_well();
    let well_at = Instant::now();
    around.recorded(1..=100).await;
    assert!(well_at.elapsed() < SECOND * 10, "{:?} to recover", well_at.elapsed());
    consumer.misses(&[]).await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn an_api_that_is_away_for_long_moves_nothing_to_the_dead_letters_and_costs_no_attempt() {
    an_api_that_is_away_costs_nothing(Answer::Status(500)).await;
}

#[tokio::test]
async fn an_api_that_hangs_for_long_moves_nothing_to_the_dead_letters_and_costs_no_attempt() {
    an_api_that_is_away_costs_nothing(Answer::Hang).await;
}

#[tokio::test]
async fn what_is_held_for_an_api_that_is_away_makes_room_for_others_after_a_while() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Status(500));
    around.publish(1..=12).await;
    // Four at a time, for 3 s.
    let settings = ["--max-consumers=2", NO_ATTEMPT_TO_SPEND, "--status-timeout=500ms"];
    let consumer = around.start(&api.endpoint(), &settings);
    eventually("each has had its turn", PATIENCE, async || {
        (1..=12).all(|id| api.lookups_of(id) > 0).then_some(())
    })
    .await;
    consumer.stop().await;
    assert_eq!((around.in_retry_queues().await, around.dead().await), (0, 0));
    assert_eq!(around.waiting().await, 12);
}

#[tokio::test]
async fn half_of_the_ids_failing_leaves_the_others_alone() {
    // Of different lengths, or all places would become free at once.
    let latency = |id: i64| Duration::from_millis(500 + id.unsigned_abs() * 37 % 1_000);
    let around = Surroundings::new().await;
    let api = StatusApi::start(move |id, _| match id % 2 {
        0 => Answer::Status(500),
        _ => Answer::After(latency(id), Box::new(Answer::Online)),
    });
    around.publish(1..=250).await;
    // Others go on after these, or at the end those that fail would be the only ones left.
    around.publish((1_001..=1_201).step_by(2)).await;
    let consumer = around.start(&api.endpoint(), &["--max-consumers=25"]);
    let has_opened = has_opened(&consumer);
    let recorded = async || around.rows().await.iter().filter(|id| **id <= 250).count();
    eventually("the others are recorded", PATIENCE, async || {
        (recorded().await == 125).then_some(())
    })
    .await;
    assert!(!has_opened().await, "it has opened");
    let lookups = api.lookups();
    let others: Vec<Instant> =
        lookups.iter().filter(|(id, _)| id % 2 == 1 && *id <= 250).map(|(_, at)| *at).collect();
    assert_eq!(others.len(), 125, "each is looked up once");
    let took = others[124] - others[0];
    let least = (1..=250).step_by(2).map(latency).sum::<Duration>() / 25;
    // Twice as long, for the sake of machines that are busy; the fault suite measures it.
    assert!(took < least * 2, "{took:?} for what takes {least:?} without the others");
    // Those that fail are tried again later.
    assert!(around.in_retry_queues().await > 0);
    consumer.stop().await;
}

#[tokio::test]
async fn isolated_failures_do_not_trip_it_and_count_as_attempts() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|id, lookup| match (id % 10, lookup) {
        (5, 1) => Answer::Status(500),
        _ => Answer::After(Duration::from_millis(20), Box::new(Answer::Online)),
    });
    around.publish(1..=300).await;
    let consumer = around.start(&api.endpoint(), &["--max-consumers=10"]);
    let has_opened = has_opened(&consumer);
    eventually("some are being tried again", PATIENCE, async || {
        (around.in_retry_queues().await > 5).then_some(())
    })
    .await;
    around.recorded(1..=300).await;
    assert!(!has_opened().await, "it has opened");
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn it_opens_up_gradually() {
    const LATENCY: Duration = Duration::from_millis(500);
    let around = Surroundings::new().await;
    let (well, begun) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
    let api = StatusApi::start({
        let (well, begun) = (Arc::clone(&well), Arc::clone(&begun));
        move |_, _| {
            if !well.load(Ordering::SeqCst) {
                return Answer::Status(500);
            }
            begun.lock().unwrap().push(Instant::now());
            Answer::After(LATENCY, Box::new(Answer::Online))
        }
    });
    around.publish(1..=300).await;
    let consumer = around.start(&api.endpoint(), &["--max-consumers=100"]);
    opened(&consumer).await;
    // What had begun before that may still be on its way to the API.
    eventually("only probes come", PATIENCE, async || {
        let times: Vec<Instant> = api.lookups().iter().map(|(_, at)| *at).collect();
        let [.., before, last] = times.as_slice() else { return None };
        (*last - *before > LATENCY).then_some(())
    })
    .await;
    well.store(true, Ordering::SeqCst);
    around.recorded(1..=300).await;
    let begun = begun.lock().unwrap().clone();
    let within = |limit| begun.iter().filter(|at| **at - begun[0] < limit).count();
    // Probes at first; what the first answers let begin; and so on, up to all places.
    assert!(within(LATENCY) <= 5, "{} lookups before the first answer", within(LATENCY));
    assert!(within(LATENCY * 2) <= 45, "{} in the second round", within(LATENCY * 2));
    assert!(api.peak_in_flight() > 50, "it is not opened up");
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn a_429_slows_the_whole_consumer_and_costs_no_attempt() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|id, lookup| match (id, lookup) {
        (20, 1) => Answer::StatusWithHeader(429, "retry-after", "3".to_owned()),
        _ => Answer::After(SECOND / 10, Box::new(Answer::Online)),
    });
    around.publish(1..=200).await;
    let settings = ["--max-consumers=5", NO_ATTEMPT_TO_SPEND];
    let consumer = around.start(&api.endpoint(), &settings);
    around.recorded(1..=200).await;
    let asked_to_wait = times_of(&api, 20)[0];
    let since = |at: Instant| at.saturating_duration_since(asked_to_wait);
    let early: Vec<Duration> = api.lookups().iter().map(|(_, at)| since(*at)).collect();
    let meanwhile = |wait: &&Duration| **wait > SECOND / 2 && **wait < SECOND * 3;
    assert_eq!(early.iter().filter(meanwhile).count(), 0, "lookups during the pause");
    assert!(early.iter().any(|wait| *wait >= SECOND * 3));
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn a_503_with_the_date_of_its_end_slows_the_whole_consumer_too() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, lookup| match lookup {
        // Its fraction of a second is cut off.
        1 => Answer::StatusWithHeader(
            503,
            "retry-after",
            httpdate::fmt_http_date(SystemTime::now() + SECOND * 4),
        ),
        _ => Answer::Online,
    });
    around.publish([1]).await;
    let consumer = around.start(&api.endpoint(), &[NO_ATTEMPT_TO_SPEND]);
    eventually("the first is told", PATIENCE, async || (!api.lookups().is_empty()).then_some(()))
        .await;
    around.publish([2]).await;
    around.recorded([1, 2]).await;
    let first = api.lookups()[0].1;
    assert!(api.lookups()[1..].iter().all(|(_, at)| *at - first >= SECOND * 2));
    consumer.stop().await;
    assert!(looked_up(&[&api]).len() >= 3);
    around.assert_all_settled().await;
}
