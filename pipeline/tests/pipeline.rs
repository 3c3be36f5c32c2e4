//! The whole pipeline as separate processes, in normal operation and during failures.

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
/// The pipeline must work again this soon after a server is back.
const RECOVERY: Duration = Duration::from_secs(10);

/// A fast status API on which, as on the real one, the even ids are online.
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
async fn wait_until_processed(accepted: &[i64], status_api: &StatusApi, pool: &PgPool) {
    eventually("every accepted id is looked up, and stored if online", PATIENCE, async || {
        let looked_up: HashSet<i64> = status_api.lookups().iter().map(|(id, _)| *id).collect();
        let stored = stored(pool).await;
        let is_processed =
            |id: &i64| looked_up.contains(id) && (id % 2 != 0 || stored.contains(id));
        accepted.iter().all(is_processed).then_some(())
    })
    .await;
}

/// Checks that no id was looked up twice, unless messages were `spooled`. A message that the broker
/// of a busy machine confirms too late also goes through the spool, and is then looked up twice.
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
    // The TTL, the interval, and 2 s for a busy machine.
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

    // The services start first, and wait for the broker and the database.
    tokio::join!(broker.kill(), database.kill());
    let producer = system.spawn("producer", &[]);
    let at_once = [("MAX_CONSUMERS", "300")];
    let mut consumer = system.spawn("consumer", &at_once);
    eventually("the consumer reports the missing servers", PATIENCE, async || {
        let (status, reasons) = consumer.get("/readyz").await;
        let names_both = reasons.contains("broker") && reasons.contains("database");
        (status == 503 && names_both).then_some(())
    })
    .await;
    tokio::join!(broker.boot(), database.boot());
    tokio::join!(producer.ready(), consumer.ready());

    let endpoint = callback_endpoint(&producer).await;
    let partner = Partner::default();
    let mut probe = 1_000_000;
    // 10,000 ids in callbacks of 20 take about 25 s. The faults happen during that time.
    let load = partner.post_all(endpoint.clone(), 0..10_000, 20, MILLISECOND * 50);
    let accepted = async |count| {
        eventually("the load continues", PATIENCE, async || {
            (partner.ledger().accepted.len() >= count).then_some(())
        })
        .await;
    };

    accepted(1_000).await;
    broker.kill().await;
    broker.boot().await;
    wait_for_recovery(&partner, &endpoint, &mut probe, database.pool()).await;

    accepted(2_000).await;
    database.kill().await;
    database.boot().await;
    wait_for_recovery(&partner, &endpoint, &mut probe, database.pool()).await;

    accepted(3_000).await;
    consumer.kill();
    consumer.wait().await;
    consumer = system.spawn("consumer", &at_once);
    wait_for_recovery(&partner, &endpoint, &mut probe, database.pool()).await;

    load.await.unwrap();
    let ledger = partner.ledger();
    // While the broker is away, a slow disk is the only reason to refuse a callback.
    let slow_disk =
        |refusal: &String| refusal.contains("the spool did not store the messages within");
    assert!(ledger.refused.iter().all(slow_disk), "{:?}", ledger.refused);
    wait_until_processed(&ledger.accepted, &status_api, database.pool()).await;
    assert!(producer.is_running() && consumer.is_running(), "they recover without a restart");
}

/// Posts new even ids until one is accepted and stored, all within [`RECOVERY`].
async fn wait_for_recovery(partner: &Partner, endpoint: &str, probe: &mut i64, pool: &PgPool) {
    let started = Instant::now();
    eventually("the pipeline recovers on its own", RECOVERY, async || {
        *probe += 2;
        let id = *probe;
        if !partner.post(endpoint, &[id]).await {
            return None;
        }
        eventually("the accepted id is stored", RECOVERY, async || {
            stored(pool).await.contains(&id).then_some(())
        })
        .await;
        Some(())
    })
    .await;
    println!("recovered after {:?}", started.elapsed());
}

#[tokio::test]
async fn killed_producer_loses_no_accepted_id() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let status_api = even_ids_online(MILLISECOND);
    let system =
        System::new(&testbed::amqp_uri(), &queue.name, database.environment(), &status_api);
    let consumer = system.spawn("consumer", &[]);
    let partner = Partner::default();
    // Each producer relays the messages that the one before left in the spool.
    let spool = Scratch::new("spool");
    let spool_dir = [("SPOOL_DIR", spool.path().to_str().unwrap())];
    for round in 0..5 {
        let producer = system.spawn("producer", &spool_dir);
        producer.ready().await;
        let endpoint = callback_endpoint(&producer).await;
        let before = partner.ledger().accepted.len();
        let first = round * 10_000;
        let load = partner.post_all(endpoint, first..first + 10_000, 50, MILLISECOND * 2);
        eventually("the load has started", PATIENCE, async || {
            (partner.ledger().accepted.len() >= before + 500).then_some(())
        })
        .await;
        producer.kill();
        load.await.unwrap();
    }
    let ledger = partner.ledger();
    assert!(ledger.unanswered > 0, "the kills should have cut off some callbacks");
    let last = system.spawn("producer", &spool_dir);
    wait_until_processed(&ledger.accepted, &status_api, database.pool()).await;
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
    wait_until_processed(&ledger.accepted, &status_api, database.pool()).await;

    let spooled = producer.metric("lastseen_spooled_total").await;
    assert_looked_up_once(&status_api, spooled);

    // The same for the producer: a callback in flight must be answered.
    let endpoint = callback_endpoint(&producer).await;
    let load = partner.post_all(endpoint, 10_000..12_000, 10, MILLISECOND * 10);
    eventually("the load has started", PATIENCE, async || {
        (partner.ledger().accepted.len() >= 3_300).then_some(())
    })
    .await;
    producer.terminate();
    assert_eq!(producer.wait().await.code(), Some(0), "it should drain");
    load.await.unwrap();
    let ledger = partner.ledger();
    let refused = ledger.refused;
    assert!(refused.is_empty(), "a draining producer refused callbacks: {refused:?}");
    wait_until_processed(&ledger.accepted, &status_api, database.pool()).await;
    staying.terminate();
    assert_eq!(staying.wait().await.code(), Some(0));
    assert_eq!(queue.depth(&queue.name).await, Some(0));
    assert_eq!(queue.depth(&queue.dead()).await, Some(0));
}

/// Two producers and two consumers are restarted one after the other while callbacks arrive, as in
/// the rollout of a new version.
#[tokio::test]
async fn rolling_restart_fails_no_callback() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let status_api = even_ids_online(MILLISECOND * 300);
    let system =
        System::new(&testbed::amqp_uri(), &queue.name, database.environment(), &status_api);
    let addresses = [(); 2].map(|()| format!("127.0.0.1:{}", testbed::free_port()));
    let producer = |address: &String| {
        let timeout = ("PUBLISH_TIMEOUT", "400ms");
        system.spawn("producer", &[("PRODUCER_ADDR", address.as_str()), timeout])
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
    let mut wait_for_load = async || {
        accepted += 500;
        eventually("the load continues", PATIENCE, async || {
            (partner.ledger().accepted.len() >= accepted).then_some(())
        })
        .await;
        accepted = partner.ledger().accepted.len();
    };

    let mut spooled = 0.0;
    for (running, address) in producers.iter_mut().zip(&addresses) {
        wait_for_load().await;
        spooled += running.metric("lastseen_spooled_total").await;
        running.terminate();
        assert_eq!(running.wait().await.code(), Some(0), "it should drain");
        wait_for_load().await;
        *running = producer(address);
        running.ready().await;
    }
    for running in &mut consumers {
        wait_for_load().await;
        running.terminate();
        assert_eq!(running.wait().await.code(), Some(0), "it should drain");
        wait_for_load().await;
        *running = consumer();
        running.ready().await;
    }
    assert!(!load.is_finished(), "the load should outlast the restarts");
    load.abort();
    _ = load.await;
    let ledger = partner.ledger();
    assert_eq!((ledger.refused, ledger.unanswered), (Vec::new(), 0));
    wait_until_processed(&ledger.accepted, &status_api, database.pool()).await;
    for producer in &producers {
        spooled += producer.metric("lastseen_spooled_total").await;
    }
    assert_looked_up_once(&status_api, spooled);
}
