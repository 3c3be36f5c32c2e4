//! Faults of the status API.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use testkit::{Answer, wait_until};

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::setup::Setup;
use crate::world::World;

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("status_api_down", down).fault("status API down for 2 minutes (20 s in `make test`), where each message has one attempt only").in_make_test(),
        Case::new("status_api_500", || run_failing(|_| Answer::Status(500), "status")).fault("status API answers all with 500 for 10 s, likewise"),
        Case::new("status_api_429", all_429).fault("status API answers all with 429 and `Retry-After: 2` for 10 s, likewise"),
        Case::new("status_api_hangs", || run_failing(|_| Answer::Hang, "timeout")).fault("status API takes lookups and is silent, likewise"),
        Case::new("status_api_trickles", || run_failing(|_| Answer::Trickle, "timeout")).fault("status API answers at a byte a second for 10 s, likewise"),
        Case::new("status_api_huge", huge).fault("status API answers with 1 GiB for 10 s, likewise; the consumer grows by less than 64 MiB"),
        Case::new("status_api_garbage", || run_failing(html_200, "garbage")).fault("status API answers in HTML for 10 s, likewise"),
        // Field case 5.1.
        Case::new("status_api_html_404", || run_failing(html_404, "not_found")).fault("an ingress in front of the status API answers all with an HTML 404 for 10 s, likewise").in_make_test(),
        // Field case 5.3.
        Case::new("status_api_partial", partial).fault("status API answers 2 of 3 lookups with 500, whatever the object, for 20 s, where each message has two attempts"),
        Case::new("status_api_wrong_id", || run_failing(wrong_id, "wrong_id")).fault("status API answers about another object for 10 s, likewise"),
        Case::new("status_api_half", half).fault("status API answers half of the ids with 500 for 10 s; the others keep 90% of their rate"),
    ]
}

const DOWN_FOR: Duration = Duration::from_secs(if cfg!(debug_assertions) { 20 } else { 120 });
/// Duration of a failure after the consumer has noticed it.
const FAILING_FOR: Duration = Duration::from_secs(10);
/// The number of failed lookups after which the consumer must have noticed.
const MIN_FAILURES: f64 = 20.0;

/// A setup in which each failed lookup that counts makes a dead letter.
fn with_single_attempt() -> Setup {
    Setup { consumer: vec![("MAX_ATTEMPTS", "1")], ..Setup::default() }
}

async fn down() -> Verdict {
    let mut world = World::under_load(with_single_attempt()).await;
    world.status_api.stop();
    wait_until_noticed(&world, "transport").await;
    world.run_for(DOWN_FOR).await;
    world.status_api.restart();
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

/// If the consumer accepted this answer, the table would contain ids that are never online.
fn wrong_id(id: i64) -> Answer {
    Answer::Body(format!(r#"{{"id":{},"online":true}}"#, id + 1))
}

/// Runs a case in which all lookups fail in one way, which the consumer counts as `outcome`.
async fn run_failing(
    behaviour: impl Fn(i64) -> Answer + Send + Sync + 'static,
    outcome: &'static str,
) -> Verdict {
    let world = World::under_load(with_single_attempt()).await;
    world.set_answers(behaviour);
    wait_until_noticed(&world, outcome).await;
    world.run_for(FAILING_FOR).await;
    world.reset_answers();
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

fn html_200(_: i64) -> Answer {
    Answer::Body("<html>Welcome to our proxy</html>".to_owned())
}

fn html_404(_: i64) -> Answer {
    const PAGE: &str = "<html><head><title>404 Not Found</title></head><body>nginx</body></html>";
    Answer::Page(404, "text/html", PAGE.to_owned())
}

/// One backend in three works, and a lookup reaches any of them.
async fn partial() -> Verdict {
    let setup = Setup { consumer: vec![("MAX_ATTEMPTS", "2")], ..Setup::default() };
    let world = World::under_load(setup).await;
    let lookups = AtomicU64::new(0);
    world.set_answers(move |id| {
        // Two of three lookups fail. If four of five failed, the breaker would sometimes open, and
        // failures do not count while it is open.
        let number = lookups.fetch_add(1, Ordering::Relaxed);
        if number.is_multiple_of(3) { Answer::even_is_online(id) } else { Answer::Status(500) }
    });
    world.run_for(FAILING_FOR * 2).await;
    let failed = failures(&world, "status").await;
    world.reset_answers();
    let mut verdict = world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await;
    verdict.require(failed >= MIN_FAILURES, format!("only {failed} lookups failed"));
    verdict
}

async fn huge() -> Verdict {
    const GIB_IN_KIB: usize = 1_024 * 1_024;
    const GROWTH_MAX_KIB: u64 = 64 * 1_024;
    let world = World::under_load(with_single_attempt()).await;
    let before = world.consumers[0].peak_rss_kib();
    world.set_answers(|_| Answer::Huge(GIB_IN_KIB));
    wait_until_noticed(&world, "garbage").await;
    world.run_for(FAILING_FOR).await;
    let peak = world.consumers[0].peak_rss_kib();
    world.reset_answers();
    let mut verdict = world.recover_and_finish(Allowed::NOTHING).await;
    let breach = format!("the consumer grew from {before} KiB to {peak} KiB");
    verdict.require(peak <= before + GROWTH_MAX_KIB, breach);
    verdict
}

async fn all_429() -> Verdict {
    // The lookups in flight at the first 429, one lookup after each pause, and as many again as a
    // margin.
    const LOOKUPS_MAX: usize = 100;
    let world = World::under_load(with_single_attempt()).await;
    let before = world.status_api.lookups().len();
    let too_many = || Answer::StatusWithHeader(429, "retry-after", "2".to_owned());
    world.set_answers(move |_| too_many());
    world.run_for(FAILING_FOR).await;
    let lookups = world.status_api.lookups().len() - before;
    world.reset_answers();
    let mut verdict = world.recover_and_finish(Allowed::NOTHING).await;
    let breach = format!("{lookups} lookups in spite of Retry-After");
    verdict.require((1..=LOOKUPS_MAX).contains(&lookups), breach);
    verdict
}

async fn half() -> Verdict {
    let world = World::under_load(Setup::default()).await;
    let before = unaffected_per_second(&world, FAILING_FOR).await;
    world.set_answers(|id| {
        if is_unaffected(id) { Answer::even_is_online(id) } else { Answer::Status(500) }
    });
    let meanwhile = unaffected_per_second(&world, FAILING_FOR).await;
    let failed = failures(&world, "status").await;
    world.reset_answers();
    let mut verdict = world.recover_and_finish(Allowed::NOTHING).await;
    let breach = format!(
        "{meanwhile:.0} lookups per second of unaffected ids, {before:.0} before the failure"
    );
    verdict.require(meanwhile >= 0.9 * before, breach);
    verdict.require(failed >= before, format!("only {failed} lookups failed"));
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
    let (until, lookups) = (SystemTime::now(), world.status_api.decisions());
    let meanwhile = |at: SystemTime| (from..until).contains(&at);
    let unaffected = lookups.iter().filter(|(id, _)| is_unaffected(**id));
    let count = unaffected.filter(|(_, lookups)| lookups.answered_at.is_some_and(meanwhile));
    let seconds = until.duration_since(from).unwrap_or(duration).as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "there are thousands")]
    let count = count.count() as f64;
    count / seconds
}

/// Waits until the consumer has counted failures of this outcome, and reports the status API as
/// away.
async fn wait_until_noticed(world: &World, outcome: &str) {
    wait_until("the consumer notices the failure of the status API", async || {
        let (status, reason) = world.consumers[0].get("/readyz").await;
        let ready = status == 200 || !reason.contains("status API");
        !ready && failures(world, outcome).await >= MIN_FAILURES
    })
    .await;
}

/// The number of the consumer's lookups with this outcome.
async fn failures(world: &World, outcome: &str) -> f64 {
    let name = format!(r#"lastseen_lookups_total{{outcome="{outcome}"}}"#);
    world.consumers[0].metric(&name).await
}
