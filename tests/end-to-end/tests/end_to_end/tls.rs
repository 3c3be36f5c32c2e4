//! Services with a broker and a database whose certificates are from a private authority.

use std::net::TcpListener;

use testkit::{
    Answer, Authority, Partner, PostgresCluster, Process, RabbitNode, StatusApi, System, all_ready,
    callback_endpoint, wait_until,
};

use crate::pipeline::stored;

#[tokio::test]
async fn services_need_the_authority_and_report_untrusted_servers() {
    let authority = Authority::new();
    let (broker, database) = tokio::join!(
        RabbitNode::start_with_tls(&authority),
        PostgresCluster::start_with_tls(&authority)
    );
    let status_api = StatusApi::start(|_, _| Answer::Online);
    let database_settings = vec![
        ("POSTGRES_HOST", "localhost".to_owned()),
        ("POSTGRES_PORT", database.port().to_string()),
        ("POSTGRES_SSLMODE", "verify-full".to_owned()),
    ];
    let amqps = broker.amqps_uri("localhost");
    let system = System::at(&amqps, "objects", database_settings, &status_api.endpoint());
    let file = authority.file().display().to_string();
    let authorities = [("AMQP_CA_FILE", file.as_str()), ("POSTGRES_SSLROOTCERT", &file)];

    let producer = system.spawn("producer", &authorities[..1]);
    let consumer = system.spawn("consumer", &authorities);
    let routine = system.spawn("routine", &authorities[1..]);
    all_ready([&producer, &consumer, &routine]).await;
    let endpoint = callback_endpoint(&producer).await;
    assert!(Partner::default().post(&endpoint, &[1, 2]).await);
    wait_until("both are stored", async || stored(database.pool()).await.len() == 2).await;

    // The system's authorities are trusted, too. This variable names the file that contains them.
    let trusting_system = system.spawn("producer", &[("SSL_CERT_FILE", &file)]);
    trusting_system.wait_for_log("connected to the broker").await;

    let unknown = "UnknownIssuer";
    let untrusting = system.spawn("consumer", &[]);
    untrusting.wait_until_unready(&["broker", "database", unknown]).await;
    untrusting.wait_for_log(unknown).await;
    let untrusting = system.spawn("producer", &[]);
    // A producer without a broker is ready, because it has a spool. So only the log is checked.
    untrusting.wait_for_log(unknown).await;
    let other_name = System { amqp_uri: broker.amqps_uri("127.0.0.1"), ..system };
    let [broker_ca, database_ca] = authorities;
    let untrusting =
        other_name.spawn("consumer", &[broker_ca, database_ca, ("POSTGRES_HOST", "127.0.0.1")]);
    untrusting.wait_until_unready(&["broker", "database", "not valid for name"]).await;
}

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
    let mut wait_for_connections = async |count: usize| {
        wait_until("the producer connects again", async || {
            open.extend(silent.accept().ok());
            open.len() >= count
        })
        .await;
    };
    wait_for_connections(2).await;
    producer.wait_for_log("does not speak AMQP").await;
    let before = threads(&producer);
    wait_for_connections(6).await;
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
    let unsupported = [("POSTGRES_SSLMODE", "allow".to_owned())];
    let routine = Process::spawn("routine", &unsupported, &[]);
    assert_eq!(routine.wait().await.code(), Some(78));
    routine.wait_for_log("POSTGRES_SSLMODE=allow: expected one of disable, prefer").await;
}
