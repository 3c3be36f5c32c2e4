use std::collections::HashSet;
use std::time::Duration;

use rand::RngExt as _;
use testkit::{Partner, eventually, wait_until};

use crate::{Home, MILLISECOND, PATIENCE};

/// The partner posts about 2,000 ids a second. The process is killed at random moments, some of
/// them during its start, and started again.
#[tokio::test]
async fn fifty_kills_under_load_lose_no_accepted_id() {
    const KILLS: i64 = 50;
    let (status_api, home) = Home::with_even_ids_online(MILLISECOND * 20);
    let partner = Partner::default();
    let mut kills_under_load = 0;
    for number in 0..KILLS {
        let lastseen = home.spawn(&["--no-tester"]);
        let delay = Duration::from_millis(rand::rng().random_range(0..300));
        // One process in ten is killed during its start.
        if number % 10 == 9 {
            tokio::time::sleep(delay / 3).await;
            lastseen.kill();
            continue;
        }
        let endpoint = testkit::callback_endpoint(&lastseen).await;
        let before = partner.ledger().accepted.len();
        let first_id = number * 1_000;
        let load = partner.post_all(endpoint, first_id..first_id + 1_000, 10, MILLISECOND * 5);
        tokio::time::sleep(delay).await;
        lastseen.kill();
        load.await.unwrap();
        kills_under_load += i64::from(partner.ledger().accepted.len() > before);
    }
    let accepted: HashSet<i64> = partner.ledger().accepted.into_iter().collect();
    assert!(kills_under_load > KILLS / 2, "only {kills_under_load} kills were under load");

    let _last = home.start(&["--no-tester"]).await;
    eventually("each accepted id is looked up", PATIENCE * 3, async || {
        accepted.iter().all(|id| status_api.lookups_of(*id) > 0).then_some(())
    })
    .await;
    wait_until("each accepted id that is online is stored", async || {
        let online: HashSet<i64> = home.online().await.into_iter().collect();
        accepted.iter().filter(|id| **id % 2 == 0).all(|id| online.contains(id))
    })
    .await;
    println!("{} accepted under {kills_under_load} kills of {KILLS}", accepted.len());
}
