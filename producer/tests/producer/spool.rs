use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rusqlite::Connection;
use testbed::{
    Process, Proxy, Queue, Scratch, WITH_READ_ONLY_ROOT, WITH_SMALL_DISK, eventually, fill_disk,
};

use crate::harness::{DEADLINE, Producer, client};
use crate::outage::proxied_broker;

#[tokio::test]
async fn spool_of_an_earlier_producer_is_relayed() {
    let (proxy, uri) = proxied_broker().await;
    proxy.cut();
    let mut producer = Producer::start_at(&uri, &[]).await;
    let mut accepted = BTreeSet::new();
    for round in 0..3 {
        for id in round * 100..round * 100 + 10 {
            let answer = producer.post_ids(&[id]).await;
            assert_eq!(answer.status, 200, "{answer:?}");
            accepted.insert(id);
        }
        producer = producer.restart(&uri, &[]).await;
    }
    proxy.restore();
    let arrived = producer.all_arrive(&accepted).await;
    assert!(arrived.values().all(|&times| times == 1), "{arrived:?}");
}

#[tokio::test]
async fn full_spool_is_answered_503_until_the_broker_is_back() {
    let (proxy, uri) = proxied_broker().await;
    proxy.cut();
    let producer = Producer::start_at(&uri, &["--spool-max-bytes=1048576"]).await;
    let mut accepted = BTreeSet::new();
    let mut next = 0;
    let refused = eventually("the spool is full", DEADLINE, async || {
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
    eventually("a callback bypasses the spool", DEADLINE, async || {
        next += 1;
        (producer.post_ids(&[next]).await.status == 200).then(|| accepted.insert(next))
    })
    .await;
    eventually("all that was accepted is in the queue", DEADLINE, async || {
        let depth = producer.queue.depth(&producer.queue.name).await?;
        (depth as usize >= accepted.len()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn with_a_full_spool_a_slow_broker_has_the_whole_deadline() {
    let (proxy, uri) = proxied_broker().await;
    proxy.cut();
    let settings = ["--spool-max-bytes=1048576", "--publish-timeout=50ms"];
    let producer = Producer::start_at(&uri, &settings).await;
    let mut next = 0;
    eventually("the spool is full", DEADLINE, async || {
        let ids: Vec<i64> = (next..next + 1_000).collect();
        next += 1_000;
        (producer.post_ids(&ids).await.status == 503).then_some(())
    })
    .await;
    proxy.restore();
    proxy.slow_down(Duration::from_millis(60)..Duration::from_millis(70), Duration::ZERO);
    eventually("the producer is connected to its broker", DEADLINE, async || {
        let missed = producer.health.missing_optional();
        missed.iter().all(|(name, _)| *name != "broker").then_some(())
    })
    .await;
    // Each direction takes longer than PUBLISH_TIMEOUT, and both together less than the deadline.
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
        eventually("the spool is open", DEADLINE, async || {
            let missed = producer.health.missing_optional();
            missed.iter().all(|(name, _)| *name != "spool").then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn producer_works_without_a_spool_until_it_can_be_opened() {
    let (proxy, uri) = proxied_broker().await;
    let blocked = BlockedDirectory::new();
    let producer = Producer::start_at(&uri, &[&blocked.argument()]).await;
    producer.ready().await;
    assert_eq!(producer.health.missing_optional()[0].0, "spool");
    assert_eq!(producer.post_ids(&[1]).await.status, 200);

    blocked.unblock(&producer).await;
    proxy.cut();
    eventually("a callback goes to the spool", DEADLINE, async || {
        (producer.post_ids(&[2]).await.status == 200).then_some(())
    })
    .await;
    proxy.restore();
    producer.all_arrive(&[1, 2].into()).await;
}

/// Posts a callback while the broker is silent and there is no spool, then makes the spool
/// available and calls `fail`. Asserts that the callback is accepted.
async fn assert_spooled_late(publish_timeout: &str, fail: impl FnOnce(&Proxy)) {
    let (proxy, uri) = proxied_broker().await;
    // A long heartbeat, so that the proxy holds only the callback, and the producer keeps the
    // connection.
    let uri = format!("{uri}?heartbeat=60");
    let blocked = BlockedDirectory::new();
    let timeout = format!("--publish-timeout={publish_timeout}");
    let producer = Producer::start_at(&uri, &[&blocked.argument(), &timeout]).await;
    producer.connected().await;
    proxy.silence();
    let unblock = async {
        eventually("the callback is in flight", DEADLINE, async || {
            (proxy.held() > 0).then_some(())
        })
        .await;
        blocked.unblock(&producer).await;
        fail(&proxy);
    };
    let (answer, ()) = tokio::join!(producer.post_ids(&[1]), unblock);
    assert_eq!(answer.status, 200, "{answer:?}");
    proxy.restore();
    producer.all_arrive(&[1].into()).await;
}

#[tokio::test]
async fn callback_failed_by_the_broker_goes_to_a_spool_opened_since() {
    assert_spooled_late("1m", Proxy::cut).await;
}

#[tokio::test]
async fn callback_without_a_confirm_goes_to_a_spool_opened_since() {
    // Longer than until the spool is reopened, and too short for the broker's connection to be
    // closed.
    assert_spooled_late("8s", |_| {}).await;
}

#[tokio::test]
async fn spool_in_use_by_another_process_is_not_opened() {
    let (proxy, uri) = proxied_broker().await;
    proxy.cut();
    let first = Producer::start_at(&uri, &[]).await;
    let argument = format!("--spool-dir={}", first.directory().join("spool").display());
    let second = Producer::start_at(&uri, &[&argument]).await;
    assert_eq!(first.post_ids(&[1]).await.status, 200);
    let answer = second.post_ids(&[2]).await;
    answer.assert_problem(503);
    let missing = second.health.missing();
    assert!(missing.iter().any(|(_, reason)| reason.contains("in use")), "{missing:?}");
}

/// Without the ballast, even deleting would fail here.
#[tokio::test]
async fn spool_on_a_full_disk_is_relayed_and_emptied() {
    let (proxy, uri) = proxied_broker().await;
    proxy.cut();
    let (queue, scratch) = (Queue::new(), Scratch::new("small"));
    let settings = [
        ("AMQP_URI", uri),
        ("QUEUE_NAME", queue.name.clone()),
        ("PRODUCER_ADDR", "127.0.0.1:0".to_owned()),
        ("SPOOL_DIR", scratch.path().display().to_string()),
    ];
    let producer = Process::spawn_wrapped(&WITH_SMALL_DISK, "producer", &settings, &[]);
    let address = producer.wait_for_log("accepting callbacks").await;
    let address = address.split("address=").nth(1).unwrap().trim().to_owned();
    let client = client();
    let post = async |ids: &[i64]| {
        let body = format!(r#"{{"object_ids":{ids:?}}}"#);
        let answer = client.post(format!("http://{address}/callback")).body(body).send().await;
        let answer = answer.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    };
    let (mut next, mut accepted) = (0, 0);
    let mut post_many = async || {
        let ids: Vec<i64> = (next..next + 1_000).collect();
        next += 1_000;
        let (status, body) = post(&ids).await;
        if status == 200 {
            accepted += 1_000;
        }
        (status, body)
    };
    for _ in 0..20 {
        assert_eq!(post_many().await.0, 200);
    }
    let filling = fill_disk(&producer, scratch.path());
    let reason = eventually("the disk is full", DEADLINE, async || {
        let (status, body) = post_many().await;
        (status == 503).then_some(body)
    })
    .await;
    assert!(reason.contains("disk is full"), "{reason}");
    eventually("it is not ready, and gives the reason", DEADLINE, async || {
        let (status, ready) = producer.get("/readyz").await;
        (status == 503 && ready.contains("disk is full")).then_some(())
    })
    .await;

    eventually("the gauge counts the waiting messages", DEADLINE, async || {
        (producer.metric("lastseen_spool_messages").await >= f64::from(accepted)).then_some(())
    })
    .await;
    let age = async || producer.metric("lastseen_spool_oldest_age_seconds").await;
    let before = age().await;
    eventually("the oldest message gets older", DEADLINE, async || {
        (age().await > before.max(0.1)).then_some(())
    })
    .await;
    proxy.restore();
    eventually("the spool is empty", DEADLINE, async || {
        let left = producer.metric("lastseen_spool_messages").await + age().await;
        (left == 0.0).then_some(())
    })
    .await;
    assert!(queue.depth(&queue.name).await.unwrap() >= accepted);
    assert_eq!(post(&[-1]).await.0, 200);

    fs::remove_file(&filling).unwrap();
    proxy.cut();
    eventually("there is room in the spool again", DEADLINE, async || {
        (post(&[-2]).await.0 == 200).then_some(())
    })
    .await;
    producer.terminate();
    assert_eq!(producer.wait().await.code(), Some(0));
}

/// Field case 3.4. The relay removes more in one transaction than SQLite journals in memory by
/// default.
#[tokio::test]
async fn spool_is_relayed_on_a_read_only_root() {
    let (proxy, uri) = proxied_broker().await;
    proxy.cut();
    let (queue, scratch) = (Queue::new(), Scratch::new("writable"));
    let settings = [
        ("AMQP_URI", uri),
        ("QUEUE_NAME", queue.name.clone()),
        ("PRODUCER_ADDR", "127.0.0.1:0".to_owned()),
        ("SPOOL_DIR", scratch.path().display().to_string()),
    ];
    let producer = Process::spawn_wrapped(&WITH_READ_ONLY_ROOT, "producer", &settings, &[]);
    let address = producer.wait_for_log("accepting callbacks").await;
    let url = format!("http://{}/callback", address.split("address=").nth(1).unwrap().trim());
    let client = client();
    for callback in 0..10 {
        let ids: Vec<i64> = (callback * 1_000..(callback + 1) * 1_000).collect();
        let answer = client.post(&url).body(format!(r#"{{"object_ids":{ids:?}}}"#)).send().await;
        assert_eq!(answer.unwrap().status(), 200);
    }
    proxy.restore();
    eventually("all are relayed", DEADLINE, async || {
        (producer.metric("lastseen_relayed_total").await >= 10_000.0).then_some(())
    })
    .await;
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
async fn spool_that_hung_is_ready_again_without_callbacks() {
    let (proxy, uri) = proxied_broker().await;
    proxy.cut();
    let producer = Producer::start_at(&uri, &[]).await;
    producer.ready().await;
    let hanging = HangingDisk::of_spool(&producer);
    producer.post_ids(&[1]).await.assert_problem(503);
    eventually("it is not ready", DEADLINE, async || {
        (!producer.health.missing().is_empty()).then_some(())
    })
    .await;
    drop(hanging);
    // Without a callback, because a load balancer sends none to a producer that is not ready.
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
    eventually("a callback is accepted", DEADLINE, async || {
        *next += 1;
        (producer.post_ids(&[*next]).await.status == 200).then_some(*next)
    })
    .await
}

/// Field case 3.6.
#[tokio::test]
async fn removed_spool_files_cost_no_accepted_callback() {
    let (proxy, uri) = proxied_broker().await;
    proxy.cut();
    let producer = Producer::start_at(&uri, &[]).await;
    let (mut accepted, mut next) = (BTreeSet::new(), 0);
    let path = spool_file(&producer);
    let remove = |path: &Path| fs::remove_file(path).unwrap();
    let removals: [&dyn Fn(); 3] =
        [&|| remove(&path.with_extension("db-wal")), &|| remove(&path), &|| {
            // The whole folder at once: file by file, this would also remove what the producer has
            // just saved.
            let folder = path.parent().unwrap();
            fs::rename(folder, folder.with_extension("removed")).unwrap();
        }];
    for removal in removals {
        accepted.insert(next_accepted(&producer, &mut next).await);
        // Messages saved from one removal must be in the new spool before the next one.
        eventually("the saved messages are in the new spool", DEADLINE, async || {
            let files = fs::read_dir(path.parent().unwrap()).into_iter().flatten().flatten();
            let mut names = files.map(|file| file.file_name().to_string_lossy().into_owned());
            (path.exists() && !names.any(|name| name.contains(".damaged-"))).then_some(())
        })
        .await;
        removal();
        accepted.insert(next_accepted(&producer, &mut next).await);
    }
    proxy.restore();
    producer.all_arrive(&accepted).await;
    assert!(!producer.served.is_finished());
}

/// Field case 3.5. The check at the start finds nothing, and the relay discovers the damage.
#[tokio::test]
async fn spool_damaged_in_the_middle_is_replaced_and_relayed() {
    let (proxy, uri) = proxied_broker().await;
    proxy.cut();
    let producer = Producer::start_at(&uri, &[]).await;
    for callback in 0..60 {
        let ids: Vec<i64> = (callback * 1_000..(callback + 1) * 1_000).collect();
        eventually("the callback is spooled", DEADLINE, async || {
            (producer.post_ids(&ids).await.status == 200).then_some(())
        })
        .await;
    }
    // The restart moves all messages from the write-ahead log to the file.
    let producer = producer.restart(&uri, &[]).await;
    let file = fs::File::options().write(true).open(spool_file(&producer)).unwrap();
    let pages = file.metadata().unwrap().len() / 4_096;
    // SQLite has read the whole file and keeps its last 2 MB in memory. Damage there would be
    // missed.
    assert!(pages * 9 / 10 * 4_096 > 3 << 20, "{pages} pages");
    file.write_all_at(&[0xA5; 8_192], pages / 10 * 4_096).unwrap();
    drop(file);
    proxy.restore();
    eventually("the damage is reported", DEADLINE, async || {
        let reported = producer.health.missing_optional();
        reported.iter().any(|(name, _)| *name == "intact spool").then_some(())
    })
    .await;
    eventually("the rest is relayed", DEADLINE, async || {
        // Two pages hold some hundred messages.
        (producer.queue.depth(&producer.queue.name).await? >= 59_500).then_some(())
    })
    .await;
    let producer = producer.restart(&uri, &[]).await;
    proxy.cut();
    assert_eq!(next_accepted(&producer, &mut 60_000).await, 60_001);
}
