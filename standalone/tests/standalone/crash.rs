use std::collections::HashSet;
use std::time::Duration;

use pipeline::Partner;
use rand::RngExt as _;
use testbed::eventually;

use crate::{Home, MILLISECOND, PATIENCE, even_ids_online};

/// The partner posts about 2,000 ids a second. The process is killed at random moments, some of
/// them during its start, and started again.
#[tokio::test]
async fn fifty_kills_under_load_lose_no_accepted_id() {
    const KILLS: i64 = 50;
    let status_api = even_ids_online(MILLISECOND * 20);
    let home = Home::with_status_api(&status_api);
    let partner = Partner::default();
    let mut kills_under_load = 0;
    for round in 0..KILLS {
        let lastseen = home.spawn(&["--no-tester"]);
        let moment = Duration::from_millis(rand::rng().random_range(0..300));
        // One process in ten is killed during its start.
        if round % 10 == 9 {
            tokio::time::sleep(moment / 3).await;
            lastseen.kill();
            continue;
        }
        let endpoint = pipeline::callback_endpoint(&lastseen).await;
        let before = partner.ledger().accepted.len();
        let first = round * 1_000;
        let load = partner.post_all(endpoint, first..first + 1_000, 10, MILLISECOND * 5);
        tokio::time::sleep(moment).await;
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
    eventually("each accepted id that is online is stored", PATIENCE, async || {
        let online: HashSet<i64> = home.online().await.into_iter().collect();
        accepted.iter().filter(|id| **id % 2 == 0).all(|id| online.contains(id)).then_some(())
    })
    .await;
    println!("{} accepted under {kills_under_load} kills of {KILLS}", accepted.len());
}
