use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::Connection;
use testkit::{
    Ledger, PATIENCE, Partner, Proxy, Queue, Scratch, System, WITH_READ_ONLY_ROOT, WITH_SMALL_DISK,
    amqp_uri, callback_endpoint, fill_disk, wait_for, wait_until,
};

use crate::DEADLINE;
use crate::harness::Producer;

#[tokio::test]
async fn spool_of_an_earlier_producer_is_relayed() {
    let (proxy, mut producer) = Producer::without_broker(&[]).await;
    let mut accepted = BTreeSet::new();
    for first_id in [0, 100, 200] {
        for id in first_id..first_id + 10 {
            let answer = producer.post_ids(&[id]).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            accepted.insert(id);
        }
        producer = producer.restart().await;
    }
    proxy.restore();
    let arrived = producer.all_arrive(&accepted).await;
    assert!(arrived.values().all(|&times| times == 1), "{arrived:?}");
}

#[tokio::test]
async fn producer_that_drains_its_spool_ends_when_it_is_empty() {
    let (proxy, uri) = Proxy::before(&amqp_uri()).await;
    proxy.cut();
    let (queue, scratch) = (Queue::new(), Scratch::new("spool"));
    let spool = scratch.path().display().to_string();
    let settings = [("SPOOL_DIR", spool.as_str()), ("DRAIN_SPOOL", "on"), ("DRAIN_TIMEOUT", "1m")];
    let producer = System::of_producers(&uri, &queue).start("producer", &settings).await;
    let endpoint = callback_endpoint(&producer).await;
    assert!(Partner::default().post(&endpoint, &[1, 2]).await);
    producer.terminate();
    producer.wait_for_log("the producer ends when its spool is empty").await;
    assert!(producer.is_running());
    proxy.restore();
    assert!(producer.wait().await.success());
    assert_eq!(queue.take_all(&queue.name).await.len(), 2);
}

#[tokio::test]
async fn callbacks_are_503_while_spool_is_full_and_broker_away() {
    let (proxy, producer) = Producer::without_broker(&["--spool-max-bytes=1048576"]).await;
    let mut accepted = BTreeSet::new();
    let mut next = 0;
    let refused = wait_for("the spool is full", async || {
        let ids: Vec<i64> = (next..next + 1_000).collect();
        next += 1_000;
        let answer = producer.post_ids(&ids).await;
        if answer.status == 200 {
            accepted.extend(ids);
            return None;
        }
        Some(answer)
    })
    .await;
    let reason = refused.assert_problem(503);
    assert!(reason.contains("it has reached its limit of 1048576 bytes"), "{reason}");
    assert!(producer.health.missing().iter().any(|(_, reason)| reason.contains("1048576")));
    // Despite SQLite's overhead, the file holds about as many messages as fit into its limit.
    assert!((5_000..50_000).contains(&accepted.len()), "{}", accepted.len());

    proxy.restore();
    wait_for("a callback bypasses the spool", async || {
        next += 1;
        (producer.post_ids(&[next]).await.status == 200).then(|| accepted.insert(next))
    })
    .await;
    wait_for("all accepted ids are in the queue", async || {
        let depth = producer.queue.depth(&producer.queue.name).await?;
        (depth as usize >= accepted.len()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn with_a_full_spool_a_slow_broker_has_the_whole_deadline() {
    let settings = ["--spool-max-bytes=1048576", "--publish-timeout=50ms"];
    let (proxy, producer) = Producer::without_broker(&settings).await;
    let mut next = 0;
    wait_until("the spool is full", async || {
        let ids: Vec<i64> = (next..next + 1_000).collect();
        next += 1_000;
        producer.post_ids(&ids).await.status == 503
    })
    .await;
    proxy.restore();
    proxy.slow_down(Duration::from_millis(60)..Duration::from_millis(70), Duration::ZERO);
    producer.connected().await;
    // Each direction takes longer than PUBLISH_TIMEOUT, but both together take less than the
    // deadline.
    let answer = producer.post_ids(&[next]).await;
    assert_eq!(answer.status, 200, "{answer:?}");
}

/// A spool directory that cannot be created, because there is a file at its path.
struct BlockedDirectory {
    path: PathBuf,
    _scratch: Scratch,
}

impl BlockedDirectory {
    fn new() -> Self {
        let scratch = Scratch::new("elsewhere");
        let path = scratch.path().join("blocked");
        fs::write(&path, "a file where a directory should be").unwrap();
        Self { path, _scratch: scratch }
    }

    fn argument(&self) -> String {
        format!("--spool-dir={}", self.path.display())
    }

    /// Removes the file, and waits until the producer has opened its spool.
    async fn unblock(&self, producer: &Producer) {
        fs::remove_file(&self.path).unwrap();
        wait_until("the spool is open", async || {
            let missed = producer.health.missing_optional();
            missed.iter().all(|(name, _)| *name != "spool")
        })
        .await;
    }
}

#[tokio::test]
async fn producer_works_without_a_spool_until_it_can_be_opened() {
    let blocked = BlockedDirectory::new();
    let (proxy, producer) = Producer::behind_proxy(&[&blocked.argument()]).await;
    producer.ready().await;
    // The relay may not be connected yet, so it may be missing too.
    assert!(producer.health.missing_optional().iter().any(|(name, _)| *name == "spool"));
    assert_eq!(producer.post_ids(&[1]).await.status, 200);

    blocked.unblock(&producer).await;
    proxy.cut();
    wait_until("a callback goes to the spool", async || {
        producer.post_ids(&[2]).await.status == 200
    })
    .await;
    proxy.restore();
    producer.all_arrive(&[1, 2].into()).await;
}

/// Posts a callback while the broker is silent and there is no spool, then makes the spool
/// available and calls `fail`. Asserts that the callback is accepted.
async fn assert_spooled_late(publish_timeout: &str, fail: impl FnOnce(&Proxy)) {
    let (proxy, uri) = Proxy::before(&amqp_uri()).await;
    // A long heartbeat, so that the proxy holds only the callback, and the producer keeps the
    // connection.
    let uri = format!("{uri}?heartbeat=60");
    let blocked = BlockedDirectory::new();
    let timeout = format!("--publish-timeout={publish_timeout}");
    let producer = Producer::start_at(&uri, &[&blocked.argument(), &timeout]).await;
    producer.connected().await;
    proxy.silence();
    let unblock = async {
        wait_until("the callback is in flight", async || proxy.held() > 0).await;
        blocked.unblock(&producer).await;
        fail(&proxy);
    };
    let (answer, ()) = tokio::join!(producer.post_ids(&[1]), unblock);
    assert_eq!(answer.status, 200, "{answer:?}");
    proxy.restore();
    producer.all_arrive(&[1].into()).await;
}

#[tokio::test]
async fn callback_the_broker_fails_goes_to_a_spool_opened_meanwhile() {
    assert_spooled_late("1m", Proxy::cut).await;
}

#[tokio::test]
async fn callback_without_a_confirm_goes_to_a_spool_opened_meanwhile() {
    // Longer than the producer takes to open the spool, and shorter than the time after which it
    // closes the connection to a silent broker.
    assert_spooled_late("8s", |_| {}).await;
}

#[tokio::test]
async fn spool_in_use_by_another_process_is_not_opened() {
    let (_proxy, first) = Producer::without_broker(&[]).await;
    let argument = format!("--spool-dir={}", first.directory().join("spool").display());
    let second = Producer::start_at(&first.amqp_uri, &[&argument]).await;
    assert_eq!(first.post_ids(&[1]).await.status, 200);
    let answer = second.post_ids(&[2]).await;
    answer.assert_problem(503);
    let missing = second.health.missing();
    assert!(missing.iter().any(|(_, reason)| reason.contains("in use")), "{missing:?}");
}

/// Without the ballast, even deleting messages would fail on the full disk.
#[tokio::test]
async fn spool_on_a_full_disk_is_relayed_and_emptied() {
    let (proxy, uri) = Proxy::before(&amqp_uri()).await;
    proxy.cut();
    let (queue, scratch) = (Queue::new(), Scratch::new("small"));
    let spool = scratch.path().display().to_string();
    let producer = System::of_producers(&uri, &queue).spawn_wrapped(
        &WITH_SMALL_DISK,
        "producer",
        &[("SPOOL_DIR", &spool)],
    );
    let endpoint = callback_endpoint(&producer).await;
    let partner = Partner::with_timeout(PATIENCE);
    let mut next = 0;
    let mut post_many = async || {
        next += 1_000;
        partner.post(&endpoint, &(next - 1_000..next).collect::<Vec<_>>()).await
    };
    for _ in 0..20 {
        assert!(post_many().await);
    }
    let filling = fill_disk(&producer, scratch.path());
    wait_until("the disk is full", async || !post_many().await).await;
    let Ledger { accepted, refused, .. } = partner.ledger();
    assert!(refused[0].starts_with("503") && refused[0].contains("disk is full"), "{refused:?}");
    producer.wait_until_unready(&["disk is full"]).await;

    let accepted = u32::try_from(accepted.len()).unwrap();
    producer.wait_for_metric("lastseen_spool_messages", accepted.into()).await;
    let age = async || producer.metric("lastseen_spool_oldest_age_seconds").await;
    let before = age().await;
    wait_until("the oldest message gets older", async || age().await > before.max(0.1)).await;
    proxy.restore();
    wait_until("the spool is empty", async || {
        producer.metric("lastseen_spool_messages").await + age().await == 0.0
    })
    .await;
    assert!(queue.depth(&queue.name).await.unwrap() >= accepted);
    assert!(partner.post(&endpoint, &[-1]).await);

    fs::remove_file(&filling).unwrap();
    proxy.cut();
    let is_accepted = async || partner.post(&endpoint, &[-2]).await;
    wait_until("there is room in the spool again", is_accepted).await;
    producer.stop().await;
}

/// Field case 3.4. The relay removes more in one transaction than SQLite journals in memory by
/// default. With that default, SQLite would need a temporary file, which it could not create here.
#[tokio::test]
async fn spool_is_relayed_on_a_read_only_root() {
    let (proxy, uri) = Proxy::before(&amqp_uri()).await;
    proxy.cut();
    let (queue, scratch) = (Queue::new(), Scratch::new("writable"));
    let spool = scratch.path().display().to_string();
    let producer = System::of_producers(&uri, &queue).spawn_wrapped(
        &WITH_READ_ONLY_ROOT,
        "producer",
        &[("SPOOL_DIR", &spool)],
    );
    let (partner, endpoint) = (Partner::with_timeout(PATIENCE), callback_endpoint(&producer).await);
    for callback in 0..10 {
        let ids: Vec<i64> = (callback * 1_000..(callback + 1) * 1_000).collect();
        assert!(partner.post(&endpoint, &ids).await);
    }
    proxy.restore();
    producer.wait_for_metric("lastseen_relayed_total", 10_000.0).await;
    assert!(queue.depth(&queue.name).await.unwrap() >= 10_000);
}

/// Blocks writes to the spool until it is dropped, as a hanging disk does.
pub(crate) struct HangingDisk(#[expect(dead_code, reason = "it holds a lock")] Connection);

impl HangingDisk {
    pub(crate) fn of_spool(producer: &Producer) -> Self {
        let spool = Connection::open(spool_file(producer)).unwrap();
        spool.busy_timeout(DEADLINE).unwrap();
        spool.execute_batch("BEGIN IMMEDIATE").unwrap();
        Self(spool)
    }
}

fn spool_file(producer: &Producer) -> PathBuf {
    producer.directory().join("spool").join("spool.db")
}

/// Field case 3.2.
#[tokio::test]
async fn producer_is_ready_again_after_the_spool_hung() {
    let (_proxy, producer) = Producer::without_broker(&[]).await;
    producer.ready().await;
    let hanging = HangingDisk::of_spool(&producer);
    producer.post_ids(&[1]).await.assert_problem(503);
    wait_until("it is not ready", async || !producer.health.missing().is_empty()).await;
    drop(hanging);
    // This must not need a callback, because a load balancer sends no callbacks to a producer that
    // is not ready.
    producer.ready().await;
    assert_eq!(producer.post_ids(&[2]).await.status, 200);
}

/// Field case 3.3. A message is committed although its callback has given up, and the relay is not
/// woken.
#[tokio::test]
async fn message_that_was_committed_late_is_relayed() {
    let producer = Producer::start(&[]).await;
    let late = "INSERT INTO message (object_id, callback_id, published_at) VALUES (1, 'late', 0)";
    let spool = Connection::open(spool_file(&producer)).unwrap();
    spool.busy_timeout(DEADLINE).unwrap();
    spool.execute(late, []).unwrap();
    producer.all_arrive(&[1].into()).await;
}

/// Posts callbacks until one is accepted, and returns its id.
async fn next_accepted(producer: &Producer, next: &mut i64) -> i64 {
    wait_for("a callback is accepted", async || {
        *next += 1;
        (producer.post_ids(&[*next]).await.status == 200).then_some(*next)
    })
    .await
}

/// Field case 3.6.
#[tokio::test]
async fn removed_spool_files_cost_no_accepted_callback() {
    let (proxy, producer) = Producer::without_broker(&[]).await;
    let (mut accepted, mut next) = (BTreeSet::new(), 0);
    let path = spool_file(&producer);
    let remove = |path: &Path| fs::remove_file(path).unwrap();
    let removals: [&dyn Fn(); 3] =
        [&|| remove(&path.with_extension("db-wal")), &|| remove(&path), &|| {
            // Remove the whole folder in one step. Removing file by file would also remove what the
            // producer has just saved.
            let folder = path.parent().unwrap();
            fs::rename(folder, folder.with_extension("removed")).unwrap();
        }];
    for removal in removals {
        accepted.insert(next_accepted(&producer, &mut next).await);
        // Messages saved from one removal must be in the new spool before the next one.
        wait_until("the saved messages are in the new spool", async || {
            let files = fs::read_dir(path.parent().unwrap()).into_iter().flatten().flatten();
            let mut names = files.map(|file| file.file_name().to_string_lossy().into_owned());
            path.exists() && !names.any(|name| name.contains(".damaged-"))
        })
        .await;
        removal();
        accepted.insert(next_accepted(&producer, &mut next).await);
    }
    proxy.restore();
    producer.all_arrive(&accepted).await;
    assert!(!producer.run.is_finished());
}

/// Field case 3.5. The check at the start finds nothing, and the relay discovers the damage.
#[tokio::test]
async fn spool_damaged_in_the_middle_is_replaced_and_relayed() {
    let (proxy, producer) = Producer::without_broker(&[]).await;
    for callback in 0..60 {
        let ids: Vec<i64> = (callback * 1_000..(callback + 1) * 1_000).collect();
        wait_until("the callback is spooled", async || producer.post_ids(&ids).await.status == 200)
            .await;
    }
    // The restart moves all messages from the write-ahead log to the file.
    let producer = producer.restart().await;
    let file = fs::File::options().write(true).open(spool_file(&producer)).unwrap();
    let pages = file.metadata().unwrap().len() / 4_096;
    // SQLite has read the whole file and keeps the last 2 MB of it in memory, so it would not
    // notice damage there.
    assert!(pages * 9 / 10 * 4_096 > 3 << 20, "{pages} pages");
    file.write_all_at(&[0xA5; 8_192], pages / 10 * 4_096).unwrap();
    drop(file);
    proxy.restore();
    wait_until("the damage is reported", async || {
        let reported = producer.health.missing_optional();
        reported.iter().any(|(name, _)| *name == "intact spool")
    })
    .await;
    wait_for("the rest is relayed", async || {
        // Two pages hold some hundred messages.
        (producer.queue.depth(&producer.queue.name).await? >= 59_500).then_some(())
    })
    .await;
    let producer = producer.restart().await;
    proxy.cut();
    assert_eq!(next_accepted(&producer, &mut 60_000).await, 60_001);
}
