//! The whole pipeline as separate processes, on good days and on bad ones.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use pipeline::{Partner, System, callback_endpoint};
use sqlx::PgPool;
use testbed::{
    Answer, Balancer, Database, PostgresCluster, Process, Queue, RabbitNode, Scratch, StatusApi,
    eventually,
};

const MILLISECOND: Duration = Duration::from_millis(1);
const PATIENCE: Duration = Duration::from_mins(1);
/// The pipeline must be at work again so soon after a server is back.
const RECOVERY: Duration = Duration::from_secs(10);

/// A status API that is quick and, like the real one, online for even ids.
fn even_ids_online(latency: Duration) -> StatusApi {
    StatusApi::start(move |id, _| {
        let answer = if id % 2 == 0 { Answer::Online } else { Answer::Offline };
        Answer::After(latency, Box::new(answer))
    })
}

async fn stored(pool: &PgPool) -> HashSet<i64> {
    let ids: Vec<i64> = sqlx::query_scalar("SELECT id FROM object").fetch_all(pool).await.unwrap();
    ids.into_iter().collect()
}

/// Waits until each accepted id has been looked up and, if it is even, stored.
async fn all_arrive(accepted: &[i64], status_api: &StatusApi, pool: &PgPool) {
    eventually("every accepted id is looked up, and stored if online", PATIENCE, async || {
        let looked_up: HashSet<i64> = status_api.lookups().iter().map(|(id, _)| *id).collect();
        let stored = stored(pool).await;
        let arrived = |id: &i64| looked_up.contains(id) && (id % 2 != 0 || stored.contains(id));
        accepted.iter().all(arrived).then_some(())
    })
    .await;
}

/// Unless messages were `spooled`: what a busy machine's broker confirms too late goes through the spool as well, and
/// is looked up twice, whichever process is stopped.
#[track_caller]
fn assert_looked_up_once(status_api: &StatusApi, spooled: f64) {
    let twice = looked_up_twice(status_api);
    assert!(twice.is_empty() || spooled > 0.0, "looked up twice because of clean stops: {twice:?}");
}

fn looked_up_twice(status_api: &StatusApi) -> Vec<i64> {
    let mut lookups = HashMap::new();
    for (id, _) in status_api.lookups() {
        *lookups.entry(id).or_insert(0) += 1;
    }
    lookups.into_iter().filter(|(_, count)| *count > 1).map(|(id, _)| id).collect()
}

#[tokio::test]
async fn callbacks_fill_the_table_and_stale_rows_are_deleted() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let port = testbed::free_port();
    let system = System {
        amqp_uri: testbed::amqp_uri(),
        queue: queue.name.clone(),
        database: database.environment(),
        status_api: format!("http://127.0.0.1:{port}"),
    };
    let producer = system.spawn("producer", &[]);
    let consumer = system.spawn("consumer", &[]);
    let lifetimes = [("OBJECT_TTL", "4s"), ("ROUTINE_INTERVAL", "500ms")];
    let routine = system.spawn("routine", &lifetimes);
    let endpoint = callback_endpoint(&producer).await;
    producer.ready().await;
    let tester_address = format!("127.0.0.1:{port}");
    let tester = system.spawn(
        "tester",
        &[
            ("TESTER_ADDR", &tester_address),
            ("CALLBACK_ENDPOINT", &endpoint),
            ("CALLBACK_INTERVAL", "500ms"),
            ("LATENCY_MIN", "20ms"),
            ("LATENCY_MAX", "200ms"),
        ],
    );
    for service in [&consumer, &routine, &tester] {
        service.ready().await;
    }

    eventually("most of the even ids are online", PATIENCE, async || {
        (stored(database.pool()).await.len() >= 45).then_some(())
    })
    .await;
    assert!(stored(database.pool()).await.iter().all(|id| id % 2 == 0 && (0..100).contains(id)));
    let oldest: f64 = sqlx::query_scalar(
        "SELECT coalesce(max(extract(epoch FROM now() - last_seen)), 0)::float8 FROM object",
    )
    .fetch_one(database.pool())
    .await
    .unwrap();
    // The TTL, an interval, and what a busy machine takes.
    assert!(oldest < 4.0 + 0.5 + 2.0, "a row is {oldest} s old");

    tester.kill();
    eventually("the table is empty", PATIENCE, async || {
        stored(database.pool()).await.is_empty().then_some(())
    })
    .await;
    eventually("the routine has counted them", PATIENCE, async || {
        (routine.metric("lastseen_deleted_rows_total").await >= 45.0).then_some(())
    })
    .await;
    for service in [producer, consumer, routine] {
        service.terminate();
        assert_eq!(service.wait().await.code(), Some(0));
    }
}

#[tokio::test]
async fn nothing_is_lost_when_broker_database_and_consumer_are_killed() {
    let (mut broker, mut database) = tokio::join!(RabbitNode::start(), PostgresCluster::start());
    let status_api = even_ids_online(MILLISECOND * 100);
    let system = System::new(&broker.amqp_uri(), "objects", database.environment(), &status_api);

    // The services come first, and wait for whoever is not there.
    tokio::join!(broker.kill(), database.kill());
    let producer = system.spawn("producer", &[]);
    let at_once = [("MAX_CONSUMERS", "300")];
    let mut consumer = system.spawn("consumer", &at_once);
    eventually("the consumer says what it misses", PATIENCE, async || {
        let (status, reasons) = consumer.get("/readyz").await;
        let told = reasons.contains("broker") && reasons.contains("database");
        (status == 503 && told).then_some(())
    })
    .await;
    tokio::join!(broker.boot(), database.boot());
    tokio::join!(producer.ready(), consumer.ready());

    let endpoint = callback_endpoint(&producer).await;
    let partner = Partner::default();
    let mut probe = 1_000_000;
    // 10,000 ids in callbacks of 20, over some 25 s; the faults fall into that time.
    let load = partner.post_all(endpoint.clone(), 0..10_000, 20, MILLISECOND * 50);
    let accepted = async |count| {
        eventually("the load goes on", PATIENCE, async || {
            (partner.ledger().accepted.len() >= count).then_some(())
        })
        .await;
    };

    accepted(1_000).await;
    broker.kill().await;
    broker.boot().await;
    is_at_work(&partner, &endpoint, &mut probe, database.pool()).await;

    accepted(2_000).await;
    database.kill().await;
    database.boot().await;
    is_at_work(&partner, &endpoint, &mut probe, database.pool()).await;

    accepted(3_000).await;
    consumer.kill();
    consumer.wait().await;
    consumer = system.spawn("consumer", &at_once);
    is_at_work(&partner, &endpoint, &mut probe, database.pool()).await;

    load.await.unwrap();
    let ledger = partner.ledger();
    // While the broker is away, a disk that is slow for a moment is a reason to refuse a callback. There is no other.
    let slow_disk =
        |refusal: &String| refusal.contains("the spool did not store the messages within");
    assert!(ledger.refused.iter().all(slow_disk), "{:?}", ledger.refused);
    all_arrive(&ledger.accepted, &status_api, database.pool()).await;
    assert!(producer.is_running() && consumer.is_running(), "they heal without a restart");
}

/// Posts an even id of its own until one is accepted, and sees it stored, all within [`RECOVERY`].
async fn is_at_work(partner: &Partner, endpoint: &str, probe: &mut i64, pool: &PgPool) {
    let back = Instant::now();
    eventually("the pipeline goes on by itself", RECOVERY, async || {
        *probe += 2;
        let id = *probe;
        if !partner.post(endpoint, &[id]).await {
            return None;
        }
        eventually("what was accepted is stored", RECOVERY, async || {
            stored(pool).await.contains(&id).then_some(())
        })
        .await;
        Some(())
    })
    .await;
    println!("at work again after {:?}", back.elapsed());
}

#[tokio::test]
async fn killed_producer_loses_no_accepted_id() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let status_api = even_ids_online(MILLISECOND);
    let system =
        System::new(&testbed::amqp_uri(), &queue.name, database.environment(), &status_api);
    let consumer = system.spawn("consumer", &[]);
    let partner = Partner::default();
    // What one of them had in it when it was killed is relayed by the next.
    let spool = Scratch::new("spool");
    let spool_dir = [("SPOOL_DIR", spool.path().to_str().unwrap())];
    for round in 0..5 {
        let producer = system.spawn("producer", &spool_dir);
        producer.ready().await;
        let endpoint = callback_endpoint(&producer).await;
        let before = partner.ledger().accepted.len();
        let first = round * 10_000;
        let load = partner.post_all(endpoint, first..first + 10_000, 50, MILLISECOND * 2);
        eventually("the load is under way", PATIENCE, async || {
            (partner.ledger().accepted.len() >= before + 500).then_some(())
        })
        .await;
        producer.kill();
        load.await.unwrap();
    }
    let ledger = partner.ledger();
    assert!(ledger.unanswered > 0, "each kill should have broken some off");
    let last = system.spawn("producer", &spool_dir);
    all_arrive(&ledger.accepted, &status_api, database.pool()).await;
    for service in [last, consumer] {
        service.terminate();
        assert_eq!(service.wait().await.code(), Some(0));
    }
}

#[tokio::test]
async fn services_stopped_under_load_drain_without_loss() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let status_api = even_ids_online(MILLISECOND * 300);
    let system =
        System::new(&testbed::amqp_uri(), &queue.name, database.environment(), &status_api);
    let producer = system.spawn("producer", &[("PUBLISH_TIMEOUT", "400ms")]);
    let consumers = [(); 2].map(|()| system.spawn("consumer", &[]));
    producer.ready().await;
    let endpoint = callback_endpoint(&producer).await;
    let partner = Partner::default();
    let load = partner.post_all(endpoint, 0..3_000, 10, MILLISECOND * 20);

    let in_flight = async |service: &Process| service.metric("lastseen_lookups_in_flight").await;
    eventually("both consumers are busy", PATIENCE, async || {
        let busy = in_flight(&consumers[0]).await > 20.0 && in_flight(&consumers[1]).await > 20.0;
        busy.then_some(())
    })
    .await;
    let [stopping, staying] = consumers;
    stopping.terminate();
    assert_eq!(stopping.wait().await.code(), Some(0), "it should drain");
    load.await.unwrap();
    let ledger = partner.ledger();
    assert_eq!((ledger.refused, ledger.unanswered), (Vec::new(), 0));
    all_arrive(&ledger.accepted, &status_api, database.pool()).await;

    let spooled = producer.metric("lastseen_spooled_total").await;
    assert_looked_up_once(&status_api, spooled);

    // And the producer: whoever is in the middle of a callback gets its answer.
    let endpoint = callback_endpoint(&producer).await;
    let load = partner.post_all(endpoint, 10_000..12_000, 10, MILLISECOND * 10);
    eventually("the load is under way", PATIENCE, async || {
        (partner.ledger().accepted.len() >= 3_300).then_some(())
    })
    .await;
    producer.terminate();
    assert_eq!(producer.wait().await.code(), Some(0), "it should drain");
    load.await.unwrap();
    let ledger = partner.ledger();
    let refused = ledger.refused;
    assert!(refused.is_empty(), "a draining producer answers what it has taken: {refused:?}");
    all_arrive(&ledger.accepted, &status_api, database.pool()).await;
    staying.terminate();
    assert_eq!(staying.wait().await.code(), Some(0));
    assert_eq!(queue.depth(&queue.name).await, Some(0));
    assert_eq!(queue.depth(&queue.dead()).await, Some(0));
}

/// Each of two producers and two consumers is stopped and started again while callbacks come in, as it
/// is when a new version is rolled out.
#[tokio::test]
async fn rolling_restart_fails_no_callback() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let status_api = even_ids_online(MILLISECOND * 300);
    let system =
        System::new(&testbed::amqp_uri(), &queue.name, database.environment(), &status_api);
    let addresses = [(); 2].map(|()| format!("127.0.0.1:{}", testbed::free_port()));
    let producer = |address: &String| {
        let late = ("PUBLISH_TIMEOUT", "400ms");
        system.spawn("producer", &[("PRODUCER_ADDR", address.as_str()), late])
    };
    let consumer = || system.spawn("consumer", &[]);
    let mut producers = addresses.each_ref().map(producer);
    let mut consumers = [consumer(), consumer()];
    for service in producers.iter().chain(&consumers) {
        service.ready().await;
    }
    let balancer = Balancer::start(addresses.each_ref().map(|a| a.parse().unwrap()).into()).await;
    let endpoint = format!("http://{}/callback", balancer.addr());
    let partner = Partner::with_timeout(PATIENCE);
    let load = partner.post_all(endpoint, 0..30_000, 5, MILLISECOND * 10);
    let mut accepted = 0;
    let mut goes_on = async || {
        accepted += 500;
        eventually("the load goes on", PATIENCE, async || {
            (partner.ledger().accepted.len() >= accepted).then_some(())
        })
        .await;
        accepted = partner.ledger().accepted.len();
    };

    let mut spooled = 0.0;
    for (place, address) in producers.iter_mut().zip(&addresses) {
        goes_on().await;
        spooled += place.metric("lastseen_spooled_total").await;
        place.terminate();
        assert_eq!(place.wait().await.code(), Some(0), "it should drain");
        goes_on().await;
        *place = producer(address);
        place.ready().await;
    }
    for place in &mut consumers {
        goes_on().await;
        place.terminate();
        assert_eq!(place.wait().await.code(), Some(0), "it should drain");
        goes_on().await;
        *place = consumer();
        place.ready().await;
    }
    assert!(!load.is_finished(), "the load should outlast the restarts");
    load.abort();
    _ = load.await;
    let ledger = partner.ledger();
    assert_eq!((ledger.refused, ledger.unanswered), (Vec::new(), 0));
    all_arrive(&ledger.accepted, &status_api, database.pool()).await;
    for producer in &producers {
        spooled += producer.metric("lastseen_spooled_total").await;
    }
    assert_looked_up_once(&status_api, spooled);
}
