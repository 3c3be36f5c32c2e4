use std::collections::HashSet;
use std::fs;

use pipeline::{Partner, callback_endpoint};
use testbed::{Process, WITH_SMALL_DISK, eventually, fill_disk};

use crate::{Home, MILLISECOND, PATIENCE, even_ids_online};

#[tokio::test]
async fn full_disk_refuses_callbacks_until_space_is_freed() {
    let status_api = even_ids_online(MILLISECOND);
    let home = Home::with_status_api(&status_api);
    fs::create_dir(home.file("")).unwrap();
    let arguments = ["--no-tester"];
    let lastseen = Process::spawn_wrapped(&WITH_SMALL_DISK, "lastseen", &home.settings, &arguments);
    lastseen.ready().await;
    let endpoint = callback_endpoint(&lastseen).await;
    let partner = Partner::default();
    assert!(partner.post(&endpoint, &[2]).await);

    let filling = fill_disk(&lastseen, &home.file(""));
    let mut next = 1_000;
    eventually("a callback is refused", PATIENCE, async || {
        next += 1_000;
        let ids: Vec<i64> = (next..next + 1_000).collect();
        (!partner.post(&endpoint, &ids).await).then_some(())
    })
    .await;
    let refused = partner.ledger().refused;
    assert!(refused[0].starts_with("503"), "{refused:?}");
    assert!(refused[0].contains("disk is full"), "{refused:?}");
    eventually("it is not ready because of the disk", PATIENCE, async || {
        let (status, body) = lastseen.get("/readyz").await;
        (status == 503 && body.contains("disk is full")).then_some(())
    })
    .await;

    fs::remove_file(&filling).unwrap();
    lastseen.ready().await;
    eventually("a callback is accepted", PATIENCE, async || {
        next += 2;
        partner.post(&endpoint, &[next]).await.then_some(())
    })
    .await;
    let accepted: HashSet<i64> = partner.ledger().accepted.into_iter().collect();
    eventually("each accepted id is looked up", PATIENCE, async || {
        accepted.iter().all(|id| status_api.lookups_of(*id) > 0).then_some(())
    })
    .await;
    eventually("each delivery is settled", PATIENCE, async || {
        let settled = lastseen.metric("lastseen_settled_total{disposition=\"ack\"}").await;
        let lookups = lastseen.metric("lastseen_lookups_total").await;
        (settled >= lookups).then_some(())
    })
    .await;
    assert!(lastseen.is_running());
    lastseen.terminate();
    assert_eq!(lastseen.wait().await.code(), Some(0));
}
