use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};

use testkit::{Proxy, free_port, wait_for, wait_until};
use tokio::task::JoinSet;

use crate::harness::{Answer, CLIENT_TIMEOUT, Producer, config};

/// Asserts that the callback was accepted before its client gave up.
fn assert_accepted(answer: &Answer) {
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(answer.took < CLIENT_TIMEOUT, "{answer:?}");
}

#[test]
fn default_publish_timeout_is_below_half_the_client_timeout() {
    assert!(config(&[]).callbacks.publish_timeout < CLIENT_TIMEOUT / 2);
}

#[tokio::test]
async fn without_a_broker_callbacks_are_accepted_and_relayed_later() {
    let (proxy, producer) = Producer::without_broker(&[]).await;
    // The producer is ready, so that a load balancer continues to send callbacks to it.
    producer.ready().await;
    let mut accepted = BTreeSet::new();
    for id in (0..100).step_by(2) {
        assert_accepted(&producer.post_ids(&[id, id + 1]).await);
        accepted.extend([id, id + 1]);
    }
    // An invalid callback is still rejected.
    producer.post("{").await.assert_problem(400);
    proxy.restore();
    let arrived = producer.all_arrive(&accepted).await;
    assert!(arrived.values().all(|&times| times == 1), "{arrived:?}");
    assert_accepted(&producer.post_ids(&[200]).await);
    producer.all_arrive(&[200].into()).await;
}

#[tokio::test]
async fn messages_are_relayed_oldest_first_with_their_callback_id() {
    let (proxy, producer) = Producer::without_broker(&[]).await;
    let mut callbacks = Vec::new();
    for id in 0..20 {
        let answer = producer.post_ids(&[id]).await;
        callbacks.push((id, answer.header("callback-id").to_owned()));
    }
    proxy.restore();
    let mut relayed = Vec::new();
    wait_until("all are relayed", async || {
        for message in producer.messages().await {
            let callback = message.delivery.properties.correlation_id().clone().unwrap();
            relayed.push((crate::harness::id_in(&message.delivery.data), callback.to_string()));
        }
        relayed.len() >= callbacks.len()
    })
    .await;
    assert_eq!(relayed[0], callbacks[0], "the oldest message is the probe");
    relayed.sort();
    assert_eq!(relayed, callbacks);
}

#[tokio::test]
async fn producer_reconnects_to_a_broker_that_cut_the_connection() {
    let (proxy, producer) = Producer::behind_proxy(&[]).await;
    let mut accepted = BTreeSet::new();
    let changes = [None, Some(Proxy::cut as fn(&Proxy)), Some(Proxy::restore)];
    for (first_id, change) in [0, 100, 200].into_iter().zip(changes) {
        if let Some(change) = change {
            change(&proxy);
        }
        for id in first_id..first_id + 20 {
            assert_accepted(&producer.post_ids(&[id]).await);
            accepted.insert(id);
        }
    }
    producer.all_arrive(&accepted).await;
}

#[tokio::test]
async fn callbacks_are_accepted_in_time_while_the_broker_is_silent() {
    let (proxy, producer) = Producer::behind_proxy(&[]).await;
    assert_accepted(&producer.post_ids(&[1]).await);

    proxy.silence();
    let mut accepted = BTreeSet::from([1]);
    assert_accepted(&producer.post_ids(&[2, 3]).await);
    // From now on the broker counts as unavailable, and callbacks do not wait for a confirm.
    let publish_timeout = config(&[]).callbacks.publish_timeout;
    let mut at_once = 0;
    for id in 10..30 {
        let answer = producer.post_ids(&[id]).await;
        assert_accepted(&answer);
        accepted.insert(id);
        at_once += usize::from(answer.took < publish_timeout);
    }
    assert!(at_once > 10, "only {at_once} of 20 went to the spool at once");

    proxy.restore();
    assert_accepted(&producer.post_ids(&[4]).await);
    accepted.extend([2, 3, 4]);
    producer.all_arrive(&accepted).await;
}

/// Posts callbacks until one is answered. Each has half as many ids as may be unconfirmed, so the
/// first two use up the publisher's capacity while they wait for their confirms.
async fn first_answer_above_publisher_capacity(producer: &Producer) -> (Vec<i64>, Answer) {
    let firsts = AtomicI64::new(0);
    wait_for("one is answered", async || {
        let first = firsts.fetch_add(5_000, Ordering::SeqCst);
        let ids: Vec<i64> = (first..first + 5_000).collect();
        let answer = tokio::time::timeout(CLIENT_TIMEOUT, producer.post_ids(&ids)).await;
        answer.ok().map(|answer| (ids, answer))
    })
    .await
}

#[tokio::test]
async fn callback_above_publisher_capacity_is_spooled_at_once() {
    // A classic queue, because removing thousands of messages from a quorum queue one by one takes
    // a minute.
    let settings = ["--publish-timeout=1m", "--queue-type=classic"];
    let (proxy, producer) = Producer::behind_proxy(&settings).await;
    producer.connected().await;
    proxy.silence();
    let (ids, answer) = first_answer_above_publisher_capacity(&producer).await;
    assert_accepted(&answer);
    proxy.restore();
    producer.all_arrive(&ids.into_iter().collect()).await;
}

#[tokio::test]
async fn callback_above_capacity_without_a_spool_is_503_at_once() {
    let settings = ["--publish-timeout=1m", "--spool-dir=/dev/null/spool"];
    let (proxy, producer) = Producer::behind_proxy(&settings).await;
    producer.connected().await;
    proxy.silence();
    let (_, answer) = first_answer_above_publisher_capacity(&producer).await;
    answer.assert_problem(503);
    assert_eq!(answer.header("retry-after"), "1");
    assert!(format!("{answer:?}").contains("unconfirmed already"), "{answer:?}");
}

#[tokio::test]
async fn producer_without_broker_and_spool_is_503_and_not_ready() {
    let unreachable = format!("amqp://guest:guest@127.0.0.1:{}/%2f", free_port());
    let no_directory = "--spool-dir=/dev/null/spool";
    let producer = Producer::start_at(&unreachable, &[no_directory]).await;
    let answer = producer.post_ids(&[1, 2, 3]).await;
    answer.assert_problem(503);
    let seconds: u32 = answer.header("retry-after").parse().unwrap();
    assert!(seconds >= 1 && answer.took < CLIENT_TIMEOUT, "{answer:?}");
    wait_for("the reasons are known", async || {
        let (name, reasons) = producer.health.missing().pop()?;
        let both = reasons.contains("cannot reach") && reasons.contains("/dev/null/spool");
        (name == "durable store" && both).then_some(())
    })
    .await;
}

/// Progress of the clients in [`deleted_queue_is_declared_again_without_loss`].
#[derive(Default)]
struct Progress {
    next_id: AtomicI64,
    deleted: AtomicBool,
    accepted_before: AtomicUsize,
    accepted_since: AtomicUsize,
    done: AtomicBool,
}

/// Sends callbacks until `done`. Returns the ids of those sent after the queue was deleted.
async fn send_callbacks(producer: Arc<Producer>, progress: Arc<Progress>) -> BTreeSet<i64> {
    let mut accepted = BTreeSet::new();
    while !progress.done.load(Ordering::SeqCst) {
        let ids = [progress.next_id.fetch_add(1, Ordering::SeqCst)];
        let deleted = progress.deleted.load(Ordering::SeqCst);
        assert_accepted(&producer.post_ids(&ids).await);
        if deleted {
            accepted.extend(ids);
            progress.accepted_since.fetch_add(1, Ordering::SeqCst);
        } else {
            progress.accepted_before.fetch_add(1, Ordering::SeqCst);
        }
    }
    accepted
}

#[tokio::test]
async fn deleted_queue_is_declared_again_without_loss() {
    let producer = Arc::new(Producer::start(&["--publish-timeout=300ms"]).await);
    for _ in 0..3 {
        let progress = Arc::new(Progress::default());
        let mut clients = JoinSet::new();
        for _ in 0..8 {
            clients.spawn(send_callbacks(Arc::clone(&producer), Arc::clone(&progress)));
        }
        let reaches = async |what: &str, count: &AtomicUsize| {
            wait_until(what, async || count.load(Ordering::SeqCst) >= 40).await;
        };
        reaches("callbacks are accepted", &progress.accepted_before).await;
        producer.queue.delete().await;
        progress.deleted.store(true, Ordering::SeqCst);
        reaches("callbacks are accepted again", &progress.accepted_since).await;
        progress.done.store(true, Ordering::SeqCst);
        let accepted: BTreeSet<i64> = clients.join_all().await.into_iter().flatten().collect();
        producer.all_arrive(&accepted).await;
    }
}
