//! The whole pipeline as separate processes, in normal operation and during restarts.

use std::collections::HashSet;
use std::time::Duration;

use sqlx::PgPool;
use testkit::{
    Database, PATIENCE, Partner, Process, Proxy, Queue, StatusApi, System, all_ready,
    callback_endpoint, wait_until,
};

const MILLISECOND: Duration = Duration::from_millis(1);

/// The ids in the table.
pub(crate) async fn stored(pool: &PgPool) -> HashSet<i64> {
    let ids: Vec<i64> = sqlx::query_scalar("SELECT id FROM object").fetch_all(pool).await.unwrap();
    ids.into_iter().collect()
}

/// Waits until each accepted id has been looked up and, if it is even, stored.
async fn wait_until_processed(accepted: &[i64], status_api: &StatusApi, pool: &PgPool) {
    wait_until("every accepted id is looked up, and stored if online", async || {
        let looked_up: HashSet<i64> = status_api.lookups().iter().map(|(id, _)| *id).collect();
        let stored = stored(pool).await;
        let is_processed =
            |id: &i64| looked_up.contains(id) && (id % 2 != 0 || stored.contains(id));
        accepted.iter().all(is_processed)
    })
    .await;
}

/// Checks that no id was looked up twice, unless messages were `spooled`. A message that the broker
/// of a busy machine confirms too late also goes through the spool, and is then looked up twice.
#[track_caller]
fn assert_looked_up_once(status_api: &StatusApi, spooled: f64) {
    let twice = status_api.looked_up_more_than(1);
    assert!(twice.is_empty() || spooled > 0.0, "looked up twice because of clean stops: {twice:?}");
}

#[tokio::test]
async fn callbacks_fill_the_table_and_stale_rows_are_deleted() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let port = testkit::free_port();
    let system = System::new(&queue, &database, &format!("http://127.0.0.1:{port}"));
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
    all_ready([&consumer, &routine, &tester]).await;

    wait_until("most of the even ids are online", async || {
        stored(database.pool()).await.len() >= 45
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
    wait_until("the table is empty", async || stored(database.pool()).await.is_empty()).await;
    routine.wait_for_metric("lastseen_deleted_rows_total", 45.0).await;
    for service in [producer, consumer, routine] {
        service.stop().await;
    }
}

#[tokio::test]
async fn services_stopped_under_load_drain_without_loss() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let status_api = StatusApi::even_ids_online(MILLISECOND * 300);
    let system = System::new(&queue, &database, &status_api.endpoint());
    let producer = system.spawn("producer", &[("PUBLISH_TIMEOUT", "400ms")]);
    let consumers = [(); 2].map(|()| system.spawn("consumer", &[]));
    producer.ready().await;
    let endpoint = callback_endpoint(&producer).await;
    let partner = Partner::default();
    let load = partner.post_all(endpoint, 0..3_000, 10, MILLISECOND * 20);

    let in_flight = async |service: &Process| service.metric("lastseen_lookups_in_flight").await;
    wait_until("both consumers are busy", async || {
        in_flight(&consumers[0]).await > 20.0 && in_flight(&consumers[1]).await > 20.0
    })
    .await;
    let [stopping, staying] = consumers;
    stopping.stop().await;
    load.await.unwrap();
    let ledger = partner.ledger();
    assert_eq!((ledger.refused, ledger.unanswered), (Vec::new(), 0));
    wait_until_processed(&ledger.accepted, &status_api, database.pool()).await;

    let spooled = producer.metric("lastseen_spooled_total").await;
    assert_looked_up_once(&status_api, spooled);

    // The same for the producer: a callback in flight must be answered.
    let endpoint = callback_endpoint(&producer).await;
    let load = partner.post_all(endpoint, 10_000..12_000, 10, MILLISECOND * 10);
    partner.wait_for_accepted(3_300).await;
    producer.stop().await;
    load.await.unwrap();
    let ledger = partner.ledger();
    let refused = ledger.refused;
    assert!(refused.is_empty(), "a draining producer refused callbacks: {refused:?}");
    wait_until_processed(&ledger.accepted, &status_api, database.pool()).await;
    staying.stop().await;
    assert_eq!(queue.depth(&queue.name).await, Some(0));
    assert_eq!(queue.depth(&queue.dead()).await, Some(0));
}

/// Two producers and two consumers are restarted one after the other while callbacks arrive, as in
/// the rollout of a new version.
#[tokio::test]
async fn rolling_restart_fails_no_callback() {
    let (queue, database) = (Queue::new(), Database::new().await);
    let status_api = StatusApi::even_ids_online(MILLISECOND * 300);
    let system = System::new(&queue, &database, &status_api.endpoint());
    let addresses = [(); 2].map(|()| format!("127.0.0.1:{}", testkit::free_port()));
    let producer = |address: &String| {
        let timeout = ("PUBLISH_TIMEOUT", "400ms");
        system.spawn("producer", &[("PRODUCER_ADDR", address.as_str()), timeout])
    };
    let consumer = || system.spawn("consumer", &[]);
    let mut producers = addresses.each_ref().map(producer);
    let mut consumers = [consumer(), consumer()];
    all_ready(producers.iter().chain(&consumers)).await;
    let balancer = Proxy::balance(addresses.to_vec()).await;
    let endpoint = format!("http://{}/callback", balancer.addr());
    let partner = Partner::with_timeout(PATIENCE);
    let load = partner.post_all(endpoint, 0..30_000, 5, MILLISECOND * 10);
    let wait_for_load = async || {
        partner.wait_for_accepted(partner.ledger().accepted.len() + 500).await;
    };

    let mut spooled = 0.0;
    for (running, address) in producers.iter_mut().zip(&addresses) {
        wait_for_load().await;
        spooled += running.metric("lastseen_spooled_total").await;
        running.stop().await;
        wait_for_load().await;
        *running = producer(address);
        running.ready().await;
    }
    for running in &mut consumers {
        wait_for_load().await;
        running.stop().await;
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
