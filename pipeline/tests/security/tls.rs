//! Services with a broker and a database whose certificates are from a private authority.

use std::net::TcpListener;

use pipeline::{Partner, System, callback_endpoint};
use testbed::{Answer, Authority, PostgresCluster, Process, RabbitNode, StatusApi, eventually};

use crate::PATIENCE;

/// Waits until the service is not ready and its reasons contain all of `parts`.
async fn wait_for_reasons(service: &Process, parts: &[&str]) {
    let what = format!("/readyz contains {parts:?}");
    eventually(&what, PATIENCE, async || {
        let (status, reasons) = service.get("/readyz").await;
        (status == 503 && parts.iter().all(|part| reasons.contains(part))).then_some(())
    })
    .await;
}

#[tokio::test]
async fn services_need_the_authority_and_report_untrusted_servers() {
    let authority = Authority::new();
    let (broker, database) = tokio::join!(
        RabbitNode::start_with_tls(&authority),
        PostgresCluster::start_with_tls(&authority)
    );
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let by_name = vec![
        ("POSTGRES_HOST", "localhost".to_owned()),
        ("POSTGRES_PORT", database.port().to_string()),
        ("POSTGRES_SSLMODE", "verify-full".to_owned()),
    ];
    let amqps = broker.amqps_uri("localhost");
    let system = System::new(&amqps, "objects", by_name, &status_api);
    let file = authority.file().display().to_string();
    let authorities = [("AMQP_CA_FILE", file.as_str()), ("POSTGRES_SSLROOTCERT", &file)];

    let producer = system.spawn("producer", &authorities[..1]);
    let consumer = system.spawn("consumer", &authorities);
    let routine = system.spawn("routine", &authorities[1..]);
    for service in [&producer, &consumer, &routine] {
        service.ready().await;
    }
    let endpoint = callback_endpoint(&producer).await;
    assert!(Partner::default().post(&endpoint, &[1, 2]).await);
    eventually("both are stored", PATIENCE, async || {
        let count = sqlx::query_scalar("SELECT count(*) FROM object").fetch_one(database.pool());
        let count: i64 = count.await.ok()?;
        (count == 2).then_some(())
    })
    .await;

    let with_system_store = system.spawn("producer", &[("SSL_CERT_FILE", &file)]);
    with_system_store.ready().await;

    let unknown = "UnknownIssuer";
    let untrusting = system.spawn("consumer", &[]);
    wait_for_reasons(&untrusting, &["broker", "database", unknown]).await;
    untrusting.wait_for_log(unknown).await;
    let untrusting = system.spawn("producer", &[]);
    // It is ready, because it has a spool.
    untrusting.wait_for_log(unknown).await;
    let other_name = System { amqp_uri: broker.amqps_uri("127.0.0.1"), ..system };
    let [broker_ca, database_ca] = authorities;
    let untrusting =
        other_name.spawn("consumer", &[broker_ca, database_ca, ("POSTGRES_HOST", "127.0.0.1")]);
    wait_for_reasons(&untrusting, &["broker", "database", "not valid for name"]).await;
}

/// The number of threads of a process.
fn threads(process: &Process) -> usize {
    std::fs::read_dir(format!("/proc/{}/task", process.pid())).unwrap().count()
}

#[tokio::test]
async fn silent_amqps_peer_leaks_no_thread() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    silent.set_nonblocking(true).unwrap();
    let environment = [
        ("AMQP_URI", format!("amqps://guest:guest@{address}/%2f")),
        ("PRODUCER_ADDR", "127.0.0.1:0".to_owned()),
    ];
    let producer = Process::spawn("producer", &environment, &[]);
    let mut open = Vec::new();
    // Each connection is held open, like those of a peer that hangs.
    let mut attempts = async |count: usize| {
        eventually("it tries again", PATIENCE, async || {
            open.extend(silent.accept().ok());
            (open.len() >= count).then_some(())
        })
        .await;
    };
    attempts(2).await;
    producer.wait_for_log("does not speak AMQP").await;
    let before = threads(&producer);
    attempts(6).await;
    let after = threads(&producer);
    assert!(after <= before, "{after} threads, {before} before");
}

#[tokio::test]
async fn invalid_certificates_stop_the_start_and_are_not_printed() {
    let key =
        "-----BEGIN PRIVATE KEY-----\nTUlHSEFnRUFNQk1HQnlxR1NNNDk=\n-----END PRIVATE KEY-----";
    for value in [key, "no certificate"] {
        let environment = [("AMQP_CA", value.to_owned())];
        let producer = Process::spawn("producer", &environment, &[]);
        assert_eq!(producer.wait().await.code(), Some(78));
        let log = producer.log().join("\n");
        assert!(log.contains("AMQP_CA=***: expected certificates in PEM form"), "{log}");
        assert!(!log.contains("TUlHSEFn"), "{log}");
    }
    let missing = [("POSTGRES_SSLMODE", "allow".to_owned())];
    let routine = Process::spawn("routine", &missing, &[]);
    assert_eq!(routine.wait().await.code(), Some(78));
    routine.wait_for_log("POSTGRES_SSLMODE=allow: expected one of disable, prefer").await;
}
