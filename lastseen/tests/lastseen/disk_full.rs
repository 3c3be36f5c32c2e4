use std::collections::HashSet;
use std::fs;

use testkit::{Partner, Process, WITH_SMALL_DISK, callback_endpoint, fill_disk, wait_until};

use crate::{Home, MILLISECOND};

#[tokio::test]
async fn full_disk_refuses_callbacks_until_space_is_freed() {
    let (status_api, home) = Home::with_even_ids_online(MILLISECOND);
    fs::create_dir(home.file("")).unwrap();
    let arguments = ["--no-tester"];
    let lastseen = Process::spawn_wrapped(&WITH_SMALL_DISK, "lastseen", &home.settings, &arguments);
    lastseen.ready().await;
    let endpoint = callback_endpoint(&lastseen).await;
    let partner = Partner::default();
    assert!(partner.post(&endpoint, &[2]).await);

    let filling = fill_disk(&lastseen, &home.file(""));
    let mut next = 1_000;
    wait_until("a callback is refused", async || {
        next += 1_000;
        let ids: Vec<i64> = (next..next + 1_000).collect();
        !partner.post(&endpoint, &ids).await
    })
    .await;
    let refused = partner.ledger().refused;
    assert!(refused[0].starts_with("503"), "{refused:?}");
    assert!(refused[0].contains("disk is full"), "{refused:?}");
    lastseen.wait_until_unready(&["disk is full"]).await;

    fs::remove_file(&filling).unwrap();
    lastseen.ready().await;
    wait_until("a callback is accepted", async || {
        next += 2;
        partner.post(&endpoint, &[next]).await
    })
    .await;
    let accepted: HashSet<i64> = partner.ledger().accepted.into_iter().collect();
    wait_until("each accepted id is looked up", async || {
        accepted.iter().all(|id| status_api.lookups_of(*id) > 0)
    })
    .await;
    wait_until("each delivery is settled", async || {
        let settled = lastseen.metric("lastseen_settled_total{disposition=\"ack\"}").await;
        let lookups = lastseen.metric("lastseen_lookups_total").await;
        settled >= lookups
    })
    .await;
    assert!(lastseen.is_running());
    lastseen.stop().await;
}
