//! Our services together with stand-ins for the Go services, on the table of the Go services. Field
//! case 4.3.

#![expect(clippy::expect_used, clippy::unwrap_used, reason = "a test fails by panicking")]

mod go;

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use sqlx::PgPool;
use testkit::{
    Answer, Database, GO_TABLE, PATIENCE, Partner, Process, Queue, RabbitNode, StatusApi, System,
    all_ready, callback_endpoint, http_get, viewer_address, wait_until,
};
use tokio::task::{JoinSet, LocalSet};

const TTL: &str = "4s";

/// The services that are ours; the others are Go services.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "every combination of these is tested")]
struct Ours {
    producer: bool,
    consumer: bool,
    routine: bool,
    tester: bool,
}

#[tokio::test]
async fn every_combination_works_with_the_go_services_table() {
    let broker = RabbitNode::start().await;
    let combination = |bits: u8| Ours {
        producer: bits & 1 != 0,
        consumer: bits & 2 != 0,
        routine: bits & 4 != 0,
        tester: bits & 8 != 0,
    };
    let combinations: Vec<Ours> = (0..16).map(combination).collect();
    // Several at once, because each one mostly waits.
    let mut number = 0;
    for group in combinations.chunks(8) {
        let (mut running, local_set) = (JoinSet::new(), LocalSet::new());
        for &ours in group {
            number += 1;
            let is_last = number == combinations.len();
            let queue = if is_last { "bitburst".to_owned() } else { format!("bitburst-{number}") };
            running.spawn_local_on(test_combination(ours, broker.amqp_uri(), queue), &local_set);
        }
        local_set.run_until(running.join_all()).await;
    }
}

async fn test_combination(ours: Ours, amqp_uri: String, queue: String) {
    let database = Database::new().await;
    let pool = database.pool();
    sqlx::raw_sql(GO_TABLE).execute(pool).await.unwrap();
    let port = testkit::free_port();
    let stand_in = (!ours.tester).then(|| StatusApi::start(|id, _| Answer::even_is_online(id)));
    let status_api =
        stand_in.as_ref().map_or_else(|| format!("http://127.0.0.1:{port}"), StatusApi::endpoint);
    let system = System::at(&amqp_uri, &queue, database.environment(), &status_api);
    let spawn = |service: &str, extra: &[(&'static str, &str)]| {
        let mut variables = vec![("QUEUE_TYPE", "classic"), ("TZ", "Europe/Berlin")];
        variables.extend(extra);
        system.spawn(service, &variables)
    };
    let mut go = JoinSet::new();
    let mut services = Vec::new();

    let endpoint = if ours.producer {
        let producer = spawn("producer", &[]);
        let endpoint = callback_endpoint(&producer).await;
        producer.ready().await;
        services.push(producer);
        endpoint
    } else {
        go::producer(&mut go, &amqp_uri, &queue).await
    };
    // Before the consumer, which would log a missing status API.
    let tester = ours.tester.then(|| {
        let address = format!("127.0.0.1:{port}");
        let variables = [
            ("TESTER_ADDR", address.as_str()),
            ("CALLBACK_ENDPOINT", endpoint.as_str()),
            ("CALLBACK_INTERVAL", "500ms"),
            ("LATENCY_MIN", "10ms"),
            ("LATENCY_MAX", "50ms"),
        ];
        spawn("tester", &variables)
    });
    if let Some(tester) = &tester {
        tester.ready().await;
    } else {
        let endpoint = endpoint.clone();
        go.spawn(async move {
            let partner = Partner::with_timeout(PATIENCE);
            let mut ticks = tokio::time::interval(Duration::from_millis(500));
            loop {
                ticks.tick().await;
                partner.post(&endpoint, &(0..20).collect::<Vec<_>>()).await;
            }
        });
    }
    if ours.consumer {
        services.push(spawn("consumer", &[]));
    } else {
        go::consumer(&mut go, (amqp_uri, queue), pool.clone(), status_api);
    }
    if ours.routine {
        let variables = [("OBJECT_TTL", TTL), ("ROUTINE_INTERVAL", "200ms")];
        services.push(spawn("routine", &variables));
    } else {
        go::routine(&mut go, pool.clone());
    }
    let viewer = spawn("viewer", &[]);
    let viewer_at = viewer_address(&viewer).await;
    services.push(viewer);
    all_ready(&services).await;

    wait_until_filled(ours, pool, viewer_at).await;
    if let Some(soak) = soak() {
        tokio::time::sleep(soak).await;
        wait_until_filled(ours, pool, viewer_at).await;
    }
    if ours.producer && ours.consumer {
        check_listing(database.url()).await;
    }
    for service in services.iter().chain(&tester) {
        check_log(ours, service);
    }

    // Without callbacks and lookups, no row is renewed.
    drop((tester, stand_in));
    if !ours.tester {
        // This also stops the Go partner. A Go routine must keep running.
        go.abort_all();
        if !ours.routine {
            go::routine(&mut go, pool.clone());
        }
    }
    wait_until(&format!("{ours:?}: all rows are gone"), async || {
        ids(pool).await.is_empty() && shown(viewer_at).await.is_empty()
    })
    .await;
}

/// The additional run time of each combination, if `SOAK` sets it, such as `SOAK=2m`.
fn soak() -> Option<Duration> {
    let soak = std::env::var("SOAK").ok()?;
    Some(humantime::parse_duration(&soak).expect("SOAK should be a duration such as 2m"))
}

/// Waits until the table and the viewer contain the online objects.
async fn wait_until_filled(ours: Ours, pool: &PgPool, viewer: SocketAddr) {
    wait_until(&format!("{ours:?}: the table fills"), async || ids(pool).await.len() >= 5).await;
    assert!(ids(pool).await.iter().all(|id| id % 2 == 0 && (0..100).contains(id)), "{ours:?}");
    wait_until(&format!("{ours:?}: the viewer shows the objects"), async || {
        let shown = shown(viewer).await;
        let is_right = |(id, age): &(i64, Duration)| id % 2 == 0 && *age < PATIENCE;
        shown.len() >= 5 && shown.iter().all(is_right)
    })
    .await;
}

/// Checks that the service has logged no warning and no error.
fn check_log(ours: Ours, service: &Process) {
    let log = service.log();
    // A warning about time only shows that this machine is busy.
    let is_problem = |line: &&String| {
        (line.contains(" WARN ") || line.contains(" ERROR ")) && !line.contains("in time")
    };
    assert_eq!(log.iter().find(is_problem), None, "{ours:?}");
}

async fn ids(pool: &PgPool) -> Vec<i64> {
    sqlx::query_scalar("SELECT id::bigint FROM object").fetch_all(pool).await.unwrap()
}

/// The objects that the viewer shows, with their ages by the clock of the test.
async fn shown(viewer: SocketAddr) -> Vec<(i64, Duration)> {
    let reply = http_get(viewer, "/objects?limit=1000").await.unwrap();
    assert_eq!(reply.status, 200, "{}", reply.body);
    let reply: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
    let objects = reply["objects"].as_array().unwrap();
    let objects = objects.iter().map(|object| {
        let id = object["id"].as_i64().or_else(|| object["id"].as_str()?.parse().ok()).unwrap();
        let last_seen = humantime::parse_rfc3339(object["last_seen"].as_str().unwrap()).unwrap();
        (id, SystemTime::now().duration_since(last_seen).unwrap_or_default())
    });
    objects.collect()
}

/// Checks that `lastseen objects` lists the objects, too.
async fn check_listing(database_url: &str) {
    let environment =
        [("DATABASE_URL", database_url.to_owned()), ("TZ", "Europe/Berlin".to_owned())];
    let list = Process::spawn("lastseen", &environment, &["objects", "--json"]);
    assert_eq!(list.wait().await.code(), Some(0));
    let lines = list.log();
    assert!(lines.iter().filter(|line| line.contains("\"last_seen\"")).count() >= 5, "{lines:?}");
}

/// An id of more than 32 bits cannot be written to an integer column, and must not be retried
/// forever.
#[tokio::test]
async fn id_that_the_go_table_cannot_hold_becomes_a_dead_letter() {
    let (queue, database) = (Queue::new(), Database::new().await);
    sqlx::raw_sql(GO_TABLE).execute(database.pool()).await.unwrap();
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let system = System::new(&queue, &database, &status_api.endpoint());
    let classic = [("QUEUE_TYPE", "classic"), ("TZ", "Europe/Berlin")];
    let producer = system.spawn("producer", &classic);
    let _consumer = system.spawn("consumer", &classic);
    producer.ready().await;
    let too_large = i64::from(i32::MAX) + 1;
    let partner = Partner::default();
    assert!(partner.post(&callback_endpoint(&producer).await, &[1, too_large, 2]).await);
    wait_until("it is a dead letter", async || queue.depth(&queue.dead()).await == Some(1)).await;
    wait_until("the others are written", async || ids(database.pool()).await.len() == 2).await;
}
