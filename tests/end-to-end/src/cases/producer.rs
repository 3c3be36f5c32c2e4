//! Faults of the producer and its spool.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use messaging::queue::Spool;
use testkit::{Partner, Process, WITH_SMALL_DISK, fill_disk, wait_until};
use tokio::net::TcpStream;

use crate::case::Case;
use crate::figures::{Allowed, Verdict};
use crate::load::Rate;
use crate::setup::Setup;
use crate::world::{SPOOLED, World};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::new("producer_killed", killed).fault("the only producer killed -9 under load, five times").in_make_test(),
        Case::new("producer_lost_with_broker", killed_without_broker).fault("broker down, and the only producer killed -9 under load three times; once more while it relays what it spooled").in_make_test(),
        Case::new("spool_full", disk_full).fault("the spool's disk full for 10 s, broker up"),
        Case::new("spool_and_broker_full", disk_full_without_broker).fault("the spool's disk full while the broker is down, and still full when that is back").in_make_test(),
        Case::new("spool_unwritable", unwritable).fault("the spool's directory cannot be written at the producer's start, and can be 8 s later"),
        Case::new("read_only_root", read_only_root).fault("services on a read-only root file system, and thousands of messages spooled while the broker is down"),
        Case::new("spool_damaged", damaged).fault("a page in the middle of the spool overwritten while producer and broker are down; a person posts what was on it"),
        Case::new("producer_rolling_restart", rolling_restart).fault("two producers behind an HAProxy that checks every 2 s and never retries, restarted one after the other; a new connection for each of 150 callbacks/s"),
        Case::new("idle_connections_soft_limit", || idle_connections(&WITH_SOFT_LIMIT)).fault("330 idle connections to a producer with a soft limit of 256 descriptors"),
        Case::new("idle_connections_hard_limit", || idle_connections(&WITH_HARD_LIMIT)).fault("330 idle connections to a producer with a hard limit of 256 descriptors"),
    ]
}

async fn killed() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    for _ in 0..5 {
        world.kill_producer();
        world.restart_producer().await;
        world.wait_for_recovery().await;
    }
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// The spool must keep all messages at each kill. The last kill hits the relay: its messages in
/// flight to the broker must still be in the spool.
async fn killed_without_broker() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    world.broker.kill().await;
    let mut least = 1.0;
    for _ in 0..3 {
        world.wait_for_spooled(least).await;
        world.run_for(Duration::from_secs(2)).await;
        let spooled_before = world.producer().metric(SPOOLED).await;
        world.kill_producer();
        world.restart_producer().await;
        // The producer accepts callbacks before it exports the size of its spool.
        world.wait_for_spooled(1.0).await;
        let spooled_after = world.producer().metric(SPOOLED).await;
        assert!(
            spooled_after >= spooled_before,
            "of {spooled_before} messages in the spool, {spooled_after} survived the kill"
        );
        least = spooled_after + 1.0;
    }
    world.broker.boot().await;
    world.producer().wait_for_metric("lastseen_relayed_total", 1.0).await;
    world.kill_producer();
    world.restart_producer().await;
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

async fn disk_full() -> Verdict {
    let world = World::under_load(with_small_spool_disk()).await;
    let filler = fill_disk(world.producer(), &world.spool());
    world.run_for(Duration::from_secs(10)).await;
    fs::remove_file(filler).expect("the filler should exist");
    world.recover_and_finish(Allowed::NOTHING).await
}

async fn disk_full_without_broker() -> Verdict {
    let mut world = World::under_load(with_small_spool_disk()).await;
    world.broker.kill().await;
    world.wait_for_spooled(1_000.0).await;
    let filler = fill_disk(world.producer(), &world.spool());
    world.producer().wait_until_unready(&["disk is full"]).await;
    world.run_for(Duration::from_secs(5)).await;
    world.broker.boot().await;
    world.wait_for_recovery().await;
    world.wait_until_all_relayed().await;
    fs::remove_file(filler).expect("the filler should exist");
    // While the broker is away and the disk is full, there is no durable store.
    world.finish(Allowed { not_2xx: true, ..Allowed::REPEATED_LOOKUPS }).await
}

/// A file takes the place of the spool's directory, because root may write to any directory.
async fn unwritable() -> Verdict {
    let mut world = World::start_servers(Setup::default()).await;
    fs::write(world.spool(), "in the way").expect("a scratch directory should be writable");
    world.start_services();
    world.wait_until_ready().await;
    world.start_load().await;
    let (_, ready) = world.producer().get("/readyz").await;
    assert!(ready.contains("without spool: "), "{ready}");
    world.run_for(Duration::from_secs(4)).await;
    fs::remove_file(world.spool()).expect("the file should still be in the way");
    wait_until("the producer has its spool", async || {
        let (_, ready) = world.producer().get("/readyz").await;
        !ready.contains("without spool: ")
    })
    .await;
    // Shows that the spool works now.
    world.broker.kill().await;
    world.wait_for_spooled(100.0).await;
    world.broker.boot().await;
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

/// Field case 3.4.
async fn read_only_root() -> Verdict {
    let mut world = World::under_load(Setup { read_only_root: true, ..Setup::default() }).await;
    world.broker.kill().await;
    world.wait_for_spooled(3_000.0).await;
    world.broker.boot().await;
    world.wait_for_recovery().await;
    world.wait_until_all_relayed().await;
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// Field case 3.5.
async fn damaged() -> Verdict {
    let mut world = World::under_load(Setup::default()).await;
    world.broker.kill().await;
    world.wait_for_spooled(2_000.0).await;
    world.kill_producer();
    let overwritten_ids = damage_a_page(&world.spool().join("spool.db")).await;
    world.restart_producer().await;
    world.producer().wait_for_log("of the damaged file have been copied").await;
    let (_, ready) = world.producer().get("/readyz").await;
    assert!(ready.contains("intact spool: "), "{ready}");
    world.broker.boot().await;
    world.wait_for_recovery().await;
    assert!(
        Partner::default().post(&world.endpoint(), &overwritten_ids).await,
        "the overwritten ids should be accepted"
    );
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

/// Overwrites a page in the middle of a closed spool, and returns the ids of the messages on it.
async fn damage_a_page(path: &Path) -> Vec<i64> {
    let spool = Spool::open(path, u64::MAX).expect("the spool should be intact");
    let messages = spool.oldest(1 << 20).await.expect("the spool should be readable");
    // Closing moves the write-ahead log into the file.
    spool.close().await;
    let mut bytes = fs::read(path).expect("the spool should be readable");
    let pages = bytes.len() / PAGE_BYTES;
    let numbers = (pages / 2..pages).find_map(|page| {
        let numbers = numbers_on(&bytes[page * PAGE_BYTES..][..PAGE_BYTES])?;
        bytes[page * PAGE_BYTES..][..PAGE_BYTES].fill(0xA5);
        Some(numbers)
    });
    let numbers = numbers.expect("there should be a page with messages");
    fs::write(path, bytes).expect("the spool should be writable");
    let overwritten = messages.iter().filter(|message| numbers.contains(&message.number));
    overwritten.map(|message| message.id).collect()
}

const PAGE_BYTES: usize = 4_096;

/// The numbers of the rows on a page of SQLite's file format; `None` if the page has no rows of a
/// table.
fn numbers_on(page: &[u8]) -> Option<HashSet<i64>> {
    let at = |offset: usize| usize::from(u16::from_be_bytes([page[offset], page[offset + 1]]));
    let cells = at(3);
    (page[0] == 0x0D && cells > 10).then(|| {
        let cell = |index: usize| &page[at(8 + 2 * index)..];
        // A cell starts with its length. Its row number follows.
        (0..cells).map(|index| varint(varint(cell(index)).1).0).collect()
    })
}

/// Decodes a SQLite varint of fewer than nine bytes. Returns the number and the bytes after it.
fn varint(bytes: &[u8]) -> (i64, &[u8]) {
    let length = bytes.iter().take_while(|byte| **byte >= 0x80).count() + 1;
    let number = bytes[..length].iter().fold(0, |sum, byte| sum << 7 | i64::from(byte & 0x7F));
    (number, &bytes[length..])
}

/// Field case 1.7
async fn rolling_restart() -> Verdict {
    let rate = Rate { callbacks: 150, ids: 5 };
    // The default of `DRAIN_DELAY`, which tests set to zero.
    let producer = vec![("DRAIN_DELAY", "8s")];
    let setup = Setup { rate, producer, more_producers: 1, ..Setup::default() };
    let mut world = World::under_load(setup).await;
    for index in 0..2 {
        world.update_producer(index).await;
    }
    world.wait_for_recovery().await;
    // If the broker confirms a message late, the message is also in the spool.
    world.finish(Allowed::REPEATED_LOOKUPS).await
}

const WITH_SOFT_LIMIT: [&str; 3] = ["sh", "-c", r#"ulimit -Sn 256 && exec "$0" "$@""#];
const WITH_HARD_LIMIT: [&str; 3] = ["sh", "-c", r#"ulimit -n 256 && exec "$0" "$@""#];

/// Field case 2.3
async fn idle_connections(producer_wrapper: &'static [&'static str]) -> Verdict {
    // The load gets no more connections than a hard limit of 256 descriptors leaves.
    let setup = Setup { producer_wrapper, connections: Some(16), ..Setup::default() };
    let mut world = World::start(setup).await;
    let mut idle = Vec::new();
    for _ in 0..330 {
        let connected = TcpStream::connect(world.callback_address()).await;
        idle.push(connected.expect("the kernel should accept the connection"));
    }
    world.start_load().await;
    let (status, _) = world.producer().get("/livez").await;
    assert_eq!(status, 200);
    let admin = [("ADMIN_ADDR", world.producer().admin().await.to_string())];
    let healthcheck = Process::spawn("producer", &admin, &["healthcheck"]);
    assert!(healthcheck.wait().await.success(), "{:?}", healthcheck.log());
    world.run_for(Duration::from_secs(5)).await;
    drop(idle);
    world.recover_and_finish(Allowed::REPEATED_LOOKUPS).await
}

fn with_small_spool_disk() -> Setup {
    Setup { producer_wrapper: &WITH_SMALL_DISK, ..Setup::default() }
}
