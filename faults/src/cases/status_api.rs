//! Faults of the status API.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use testbed::{Answer, eventually};

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::status_api::correct_answer;
use crate::world::{Setup, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new(
            "status_api_down",
            "status API down for 2 minutes (20 s in `make test`), where each message has one attempt only",
            down,
        )
        .in_make_test(),
        Case::new("status_api_500", "status API answers all with 500 for 10 s, likewise", all_500),
        Case::new(
            "status_api_429",
            "status API answers all with 429 and `Retry-After: 2` for 10 s, likewise",
            all_429,
        ),
        Case::new("status_api_hangs", "status API takes lookups and is silent, likewise", hanging),
        Case::new(
            "status_api_trickles",
            "status API answers at a byte a second for 10 s, likewise",
            trickling,
        ),
        Case::new(
            "status_api_huge",
            "status API answers with 1 GiB for 10 s, likewise; the consumer grows by less than 64 MiB",
            huge,
        ),
        Case::new("status_api_garbage", "status API answers in HTML for 10 s, likewise", garbage),
        // Field case 5.1.
        Case::new(
            "status_api_html_404",
            "an ingress in front of the status API answers all with an HTML 404 for 10 s, likewise",
            html_404,
        )
        .in_make_test(),
        // Field case 5.3.
        Case::new(
            "status_api_partial",
            "status API answers 2 of 3 lookups with 500, whatever the object, for 20 s, where each message has two attempts",
            partial,
        ),
        Case::new(
            "status_api_wrong_id",
            "status API answers about another object for 10 s, likewise",
            wrong_id,
        ),
        Case::new(
            "status_api_half",
            "status API answers half of the ids with 500 for 10 s; the others keep 90% of their rate",
            half,
        ),
    ]
}

/// Duration of an outage.
const DOWN_FOR: Duration = Duration::from_secs(if cfg!(debug_assertions) { 20 } else { 120 });
/// Duration of a failure after the consumer has noticed it.
const FAILING_FOR: Duration = Duration::from_secs(10);
/// The number of failed lookups after which the consumer must have noticed.
const MIN_FAILURES: f64 = 20.0;
/// Longer than a lookup may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// A setup in which each failed lookup that counts makes a dead letter.
fn with_single_attempt() -> Setup {
    Setup { consumer: vec![("MAX_ATTEMPTS", "1")], ..Setup::default() }
}

async fn down() -> Verdict {
    let mut world = World::start(with_single_attempt()).await;
    world.start_load().await;
    world.status_api.stop();
    wait_until_noticed(&world, "transport").await;
    world.run_for(DOWN_FOR).await;
    world.status_api.restart();
    world.wait_for_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn all_500() -> Verdict {
    run_failing(|_| Answer::Status(500), "status").await
}

async fn hanging() -> Verdict {
    run_failing(|_| Answer::Hang, "timeout").await
}

async fn trickling() -> Verdict {
    run_failing(|_| Answer::Trickle, "timeout").await
}

async fn garbage() -> Verdict {
    run_failing(|_| Answer::Body("<html>Welcome to our proxy</html>".to_owned()), "garbage").await
}

async fn wrong_id() -> Verdict {
    // If the consumer accepted this answer, the table would contain ids that are never online.
    let online = |id| Answer::Body(format!(r#"{{"id":{id},"online":true}}"#));
    run_failing(move |id| online(id + 1), "wrong_id").await
}

/// Runs a case in which all lookups fail in one way, which the consumer counts as `outcome`.
async fn run_failing(
    behaviour: impl Fn(i64) -> Answer + Send + Sync + 'static,
    outcome: &str,
) -> Verdict {
    let mut world = World::start(with_single_attempt()).await;
    world.start_load().await;
    world.status_api.set_behaviour(behaviour);
    wait_until_noticed(&world, outcome).await;
    world.run_for(FAILING_FOR).await;
    world.status_api.reset_behaviour();
    world.wait_for_recovery().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

async fn html_404() -> Verdict {
    const PAGE: &str = "<html><head><title>404 Not Found</title></head><body>nginx</body></html>";
    run_failing(|_| Answer::Page(404, "text/html", PAGE.to_owned()), "not_found").await
}

/// One backend in three works, and a lookup reaches any of them.
async fn partial() -> Verdict {
    let setup = Setup { consumer: vec![("MAX_ATTEMPTS", "2")], ..Setup::default() };
    let mut world = World::start(setup).await;
    world.start_load().await;
    let lookups = AtomicU64::new(0);
    world.status_api.set_behaviour(move |id| {
        // Two of three: four of five would sometimes open the breaker, and then no failure counts.
        let number = lookups.fetch_add(1, Ordering::Relaxed);
        if number.is_multiple_of(3) { correct_answer(id) } else { Answer::Status(500) }
    });
    world.run_for(FAILING_FOR * 2).await;
    let failed = failures(&world, "status").await;
    world.status_api.reset_behaviour();
    world.wait_for_recovery().await;
    let mut verdict = world.finish(Allowed::REPEATED_LOOKUPS).await;
    if failed < MIN_FAILURES {
        verdict.breaches.push(format!("only {failed} lookups failed"));
    }
    verdict
}

async fn huge() -> Verdict {
    const GIB_IN_KIB: usize = 1_024 * 1_024;
    const GROWTH_MAX_KIB: u64 = 64 * 1_024;
    let mut world = World::start(with_single_attempt()).await;
    world.start_load().await;
    let before = world.consumers[0].peak_rss_kib();
    world.status_api.set_behaviour(|_| Answer::Huge(GIB_IN_KIB));
    wait_until_noticed(&world, "garbage").await;
    world.run_for(FAILING_FOR).await;
    let peak = world.consumers[0].peak_rss_kib();
    world.status_api.reset_behaviour();
    world.wait_for_recovery().await;
    let mut verdict = world.finish(Allowed::NOTHING).await;
    if peak > before + GROWTH_MAX_KIB {
        verdict.breaches.push(format!("the consumer grew from {before} KiB to {peak} KiB"));
    }
    verdict
}

async fn all_429() -> Verdict {
    // One after each pause, the lookups in flight at the first 429, and as many again.
    const LOOKUPS_MAX: usize = 100;
    let mut world = World::start(with_single_attempt()).await;
    world.start_load().await;
    let before = world.status_api.lookup_count();
    let too_many = || Answer::StatusWithHeader(429, "retry-after", "2".to_owned());
    world.status_api.set_behaviour(move |_| too_many());
    world.run_for(FAILING_FOR).await;
    let lookups = world.status_api.lookup_count() - before;
    world.status_api.reset_behaviour();
    world.wait_for_recovery().await;
    let mut verdict = world.finish(Allowed::NOTHING).await;
    if !(1..=LOOKUPS_MAX).contains(&lookups) {
        verdict.breaches.push(format!("{lookups} lookups in spite of Retry-After"));
    }
    verdict
}

async fn half() -> Verdict {
    let mut world = World::start(Setup::default()).await;
    world.start_load().await;
    let before = unaffected_per_second(&world, FAILING_FOR).await;
    world.status_api.set_behaviour(|id| {
        if is_unaffected(id) { correct_answer(id) } else { Answer::Status(500) }
    });
    let meanwhile = unaffected_per_second(&world, FAILING_FOR).await;
    let failed = failures(&world, "status").await;
    world.status_api.reset_behaviour();
    world.wait_for_recovery().await;
    let mut verdict = world.finish(Allowed::NOTHING).await;
    if meanwhile < 0.9 * before {
        verdict.breaches.push(format!(
            "{meanwhile:.0} lookups per second of unaffected ids, {before:.0} before the failure"
        ));
    }
    if failed < before {
        verdict.breaches.push(format!("only {failed} lookups failed"));
    }
    verdict
}

/// True for half of the ids, of which half are online.
fn is_unaffected(id: i64) -> bool {
    id % 4 < 2
}

/// The number of unaffected ids per second whose first lookup is answered within the next
/// `duration`.
async fn unaffected_per_second(world: &World, duration: Duration) -> f64 {
    let from = SystemTime::now();
    world.run_for(duration).await;
    let (until, lookups) = (SystemTime::now(), world.status_api.lookups());
    let meanwhile = |at: SystemTime| (from..until).contains(&at);
    let unaffected = lookups.iter().filter(|(id, _)| is_unaffected(**id));
    let count = unaffected.filter(|(_, lookups)| lookups.answered_at.is_some_and(meanwhile));
    let seconds = until.duration_since(from).unwrap_or(duration).as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "there are thousands")]
    let count = count.count() as f64;
    count / seconds
}

/// Waits until the consumer has counted failures of this outcome, and reports a missing status API.
async fn wait_until_noticed(world: &World, outcome: &str) {
    eventually("the consumer notices the failure of the status API", PATIENCE, async || {
        let (status, reason) = world.consumers[0].get("/readyz").await;
        let ready = status == 200 || !reason.contains("status API");
        (!ready && failures(world, outcome).await >= MIN_FAILURES).then_some(())
    })
    .await;
}

/// The number of the consumer's lookups with this outcome.
async fn failures(world: &World, outcome: &str) -> f64 {
    let name = format!(r#"lastseen_lookups_total{{outcome="{outcome}"}}"#);
    world.consumers[0].metric(&name).await
}
