use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use testbed::{Proxy, amqp_uri, eventually, free_port};
use tokio::task::JoinSet;
use url::Url;

use crate::front_door::{Answer, Broker, CLIENT_PATIENCE, DEADLINE, Producer, config};

/// How soon callbacks are accepted again once the broker is back.
const RECOVERY: Duration = Duration::from_secs(5);

/// Shorter than the default, so that a loaded machine has time left within the client's patience.
const PUBLISH_TIMEOUT: &str = "--publish-timeout=500ms";

/// A proxy in front of the shared broker, and the URI that leads through it.
async fn proxied_broker() -> (Proxy, String) {
    let mut uri = Url::parse(&amqp_uri()).unwrap();
    let proxy =
        Proxy::start(format!("{}:{}", uri.host_str().unwrap(), uri.port().unwrap_or(5672))).await;
    uri.set_host(Some(&proxy.addr().ip().to_string())).unwrap();
    uri.set_port(Some(proxy.addr().port())).unwrap();
    (proxy, uri.to_string())
}

/// That the callback was refused, in time for its client to hear of it.
fn assert_unavailable(answer: &Answer) {
    answer.assert_problem(503);
    let seconds: u32 = answer.header("retry-after").parse().unwrap();
    assert!(seconds >= 1, "{answer:?}");
    assert!(answer.took < CLIENT_PATIENCE, "{answer:?}");
}

async fn accepted_again(producer: &Producer, id: i64) {
    eventually("callbacks are accepted again", DEADLINE, async || {
        (producer.post_ids(&[id]).await.status == 200).then_some(())
    })
    .await;
}

#[test]
fn by_default_the_brokers_time_ends_before_the_clients() {
    assert!(config(&[]).callbacks.publish_timeout < CLIENT_PATIENCE);
}

#[tokio::test]
async fn without_a_broker_a_callback_is_answered_503_and_readiness_says_why() {
    let uri = format!("amqp://guest:guest@127.0.0.1:{}/%2f", free_port());
    let producer = Producer::start_at(&uri, &[]).await;
    assert_unavailable(&producer.post_ids(&[1, 2, 3]).await);
    let reason = eventually("the reason is known", DEADLINE, async || {
        let missing = producer.health.missing();
        missing.into_iter().find(|(_, reason)| reason.contains("cannot reach"))
    })
    .await;
    assert_eq!(reason.0, "broker");
    assert_unavailable(&producer.post_ids(&[1, 2, 3]).await);
    // A bad callback is told so all the same.
    producer.post("{").await.assert_problem(400);
}

#[tokio::test]
async fn a_broker_that_cuts_the_connection_is_found_again() {
    let (proxy, uri) = proxied_broker().await;
    let producer = Producer::start_at(&uri, &[]).await;
    producer.ready().await;
    assert_eq!(producer.post_ids(&[1]).await.status, 200);

    proxy.cut();
    eventually("the broker is missed", DEADLINE, async || {
        assert_ne!(producer.post_ids(&[2]).await.status, 400);
        (!producer.health.missing().is_empty()).then_some(())
    })
    .await;
    assert_unavailable(&producer.post_ids(&[2]).await);
    proxy.restore();
    let restored = Instant::now();
    accepted_again(&producer, 3).await;
    assert!(restored.elapsed() < RECOVERY, "{:?}", restored.elapsed());
    assert!(producer.health.missing().is_empty());
    let ids = producer.ids().await;
    assert!(ids.contains(&1) && ids.contains(&3), "{ids:?}");
}

#[tokio::test]
async fn while_the_broker_is_silent_every_callback_is_answered_503_within_the_clients_patience() {
    let (proxy, uri) = proxied_broker().await;
    let producer = Producer::start_at(&uri, &[PUBLISH_TIMEOUT]).await;
    producer.ready().await;
    assert_eq!(producer.post_ids(&[1]).await.status, 200);

    proxy.silence();
    let (name, _) = eventually("the broker is missed", 2 * DEADLINE, async || {
        assert_unavailable(&producer.post_ids(&[2, 3]).await);
        producer.health.missing().into_iter().next()
    })
    .await;
    assert_eq!(name, "broker");
    assert_unavailable(&producer.post_ids(&[2, 3]).await);

    proxy.restore();
    let restored = Instant::now();
    accepted_again(&producer, 4).await;
    assert!(restored.elapsed() < RECOVERY, "{:?}", restored.elapsed());
    // What was refused may have arrived all the same, what was accepted must have.
    let ids = producer.ids().await;
    assert!(ids.contains(&1) && ids.contains(&4), "{ids:?}");
}

#[tokio::test]
async fn a_silence_that_ends_before_it_is_noticed_leaves_the_producer_working() {
    let (proxy, uri) = proxied_broker().await;
    let producer = Producer::start_at(&uri, &[PUBLISH_TIMEOUT]).await;
    producer.ready().await;
    proxy.silence();
    assert_unavailable(&producer.post_ids(&[1]).await);
    proxy.restore();
    accepted_again(&producer, 2).await;
    assert!(producer.ids().await.contains(&2));
}

/// What the clients of the test below saw.
#[derive(Default)]
struct Seen {
    next_id: AtomicI64,
    deleted: AtomicBool,
    accepted_before: AtomicUsize,
    accepted_since: AtomicUsize,
    refused: AtomicUsize,
    done: AtomicBool,
}

/// Sends callback after callback, and gives the ids of those that were begun after the queue had
/// been deleted and were accepted.
async fn send_callbacks(producer: Arc<Producer>, seen: Arc<Seen>) -> BTreeSet<i64> {
    let mut accepted = BTreeSet::new();
    while !seen.done.load(Ordering::SeqCst) {
        let ids = [seen.next_id.fetch_add(1, Ordering::SeqCst)];
        let deleted = seen.deleted.load(Ordering::SeqCst);
        let answer = producer.post_ids(&ids).await;
        match (answer.status, deleted) {
            (200, false) => _ = seen.accepted_before.fetch_add(1, Ordering::SeqCst),
            (200, true) => {
                accepted.extend(ids);
                seen.accepted_since.fetch_add(1, Ordering::SeqCst);
            }
            _ => {
                assert_unavailable(&answer);
                seen.refused.fetch_add(1, Ordering::SeqCst);
            }
        }
    }
    accepted
}

#[tokio::test]
async fn nothing_is_accepted_that_a_deleted_queue_did_not_take_and_the_queue_comes_back() {
    let producer = Arc::new(Producer::start(&[PUBLISH_TIMEOUT]).await);
    let broker = Broker::connect().await;
    for _ in 0..3 {
        let seen = Arc::new(Seen::default());
        let mut clients = JoinSet::new();
        for _ in 0..8 {
            clients.spawn(send_callbacks(Arc::clone(&producer), Arc::clone(&seen)));
        }
        let reaches = async |what: &str, count: &AtomicUsize| {
            eventually(what, DEADLINE, async || (count.load(Ordering::SeqCst) >= 40).then_some(()))
                .await;
        };
        reaches("callbacks are accepted", &seen.accepted_before).await;
        broker.delete_queue(&producer.queue.name).await;
        seen.deleted.store(true, Ordering::SeqCst);
        reaches("callbacks are accepted again", &seen.accepted_since).await;
        seen.done.store(true, Ordering::SeqCst);

        let accepted: BTreeSet<i64> = clients.join_all().await.into_iter().flatten().collect();
        assert!(seen.refused.load(Ordering::SeqCst) > 0, "the deletion was not noticed");
        let queued: BTreeSet<i64> = producer.ids().await.into_iter().collect();
        let lost: Vec<_> = accepted.difference(&queued).collect();
        assert!(lost.is_empty(), "{} of {} are lost: {lost:?}", lost.len(), accepted.len());
    }
}
