use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use pipeline::{Partner, callback_endpoint};
use testbed::{Process, eventually};

use crate::{Home, MILLISECOND, PATIENCE, even_ids_online};

/// Mounts a small disk at the directory in its last argument, for itself alone, and becomes the
/// process that follows. Only root may do so, and whoever is root in a name space of its own.
const ON_A_SMALL_DISK: [&str; 7] = [
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    r#"mount -t tmpfs -o size=6m small "$LASTSEEN_DIR" && exec "$0" "$@""#,
];

#[tokio::test]
async fn on_a_full_disk_callbacks_are_refused_and_all_goes_on_when_there_is_room() {
    let status_api = even_ids_online(MILLISECOND);
    let home = Home::beside(&status_api);
    fs::create_dir(home.file("")).unwrap();
    let arguments = ["--no-tester"];
    let lastseen = Process::spawn_through(&ON_A_SMALL_DISK, "lastseen", &home.settings, &arguments);
    lastseen.ready().await;
    let endpoint = callback_endpoint(&lastseen).await;
    let partner = Partner::default();
    assert!(partner.post(&endpoint, &[2]).await);

    // Seen from outside, its disk is below its own root.
    let disk = PathBuf::from(format!("/proc/{}/root", lastseen.pid()));
    let disk = disk.join(home.file("").strip_prefix("/").unwrap());
    let ballast = disk.join("ballast");
    let filled = fs::write(&ballast, vec![0; 8 << 20]).unwrap_err();
    assert_eq!(filled.kind(), std::io::ErrorKind::StorageFull);
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
    eventually("it is not ready, and says why", PATIENCE, async || {
        let (status, body) = lastseen.get("/readyz").await;
        (status == 503 && body.contains("disk is full")).then_some(())
    })
    .await;

    fs::remove_file(&ballast).unwrap();
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
    eventually("and what is looked up is settled", PATIENCE, async || {
        let settled = lastseen.metric("lastseen_settled_total{disposition=\"ack\"}").await;
        let lookups = lastseen.metric("lastseen_lookups_total").await;
        (settled >= lookups).then_some(())
    })
    .await;
    assert!(lastseen.is_running());
    lastseen.terminate();
    assert_eq!(lastseen.wait().await.code(), Some(0));
}
