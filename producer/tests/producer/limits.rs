use std::time::Duration;

use testkit::{Queue, System, Wire, amqp_uri, producer_address, wait_for, wait_until};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::DEADLINE;
use crate::harness::{Producer, assert_problem_reply};

// Field case 1.6
#[tokio::test]
async fn connection_may_idle_for_longer_than_the_header_timeout() {
    let producer = Producer::start(&["--header-timeout=300ms"]).await;
    let mut idle = Wire::connect(producer.address).await;
    assert_eq!(idle.post_callback(1).await.status, 200);
    let mut unfinished = Wire::connect(producer.address).await;
    unfinished.send("POST /callback HTTP/1.1\r\nHost:").await;
    unfinished.closed().await;
    assert_eq!(idle.post_callback(2).await.status, 200);
}

#[tokio::test]
async fn idle_connection_is_closed_after_the_idle_timeout() {
    let producer = Producer::start(&["--idle-timeout=300ms"]).await;
    let mut idle = Wire::connect(producer.address).await;
    assert_eq!(idle.post_callback(1).await.status, 200);
    idle.closed().await;
}

#[tokio::test]
async fn stalled_body_is_answered_408() {
    let producer = Producer::start(&["--body-timeout=300ms"]).await;
    let mut wire = Wire::connect(producer.address).await;
    wire.send("POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\n{\"object_ids\"")
        .await;
    let reply = wire.reply().await;
    assert_problem_reply(&reply, 408, "300ms");
    producer.assert_nothing_queued().await;
}

// Field case 2.3
#[tokio::test]
async fn idle_connections_at_the_limit_do_not_delay_a_callback() {
    let producer = Producer::start(&["--max-connections=2"]).await;
    let mut idle = Vec::new();
    for _ in 0..5 {
        idle.push(Wire::connect(producer.address).await);
    }
    let mut wire = Wire::connect(producer.address).await;
    assert_eq!(wire.post_callback(1).await.status, 200);
}

#[tokio::test]
async fn request_in_flight_at_shutdown_is_answered() {
    let mut producer = Producer::start(&[]).await;
    let mut in_flight = Wire::connect(producer.address).await;
    let head =
        "POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\nExpect: 100-continue\r\n\r\n";
    in_flight.send(head).await;
    // The producer sends 100 when it begins to read the body.
    assert_eq!(in_flight.reply().await.status, 100);

    producer.shutdown.cancel();
    wait_for("no new connections are accepted", async || {
        TcpStream::connect(producer.address).await.err()
    })
    .await;
    assert!(!producer.run.is_finished());
    in_flight.send(r#"{"object_ids":[5]}"#).await;
    assert_eq!(in_flight.reply().await.status, 200);
    let served = timeout(DEADLINE, &mut producer.run).await.unwrap().unwrap();
    assert!(served.is_ok(), "{served:?}");
    assert_eq!(producer.ids().await, [5]);
}

#[tokio::test]
async fn critical_tasks_are_supervised_until_the_end() {
    let producer = Producer::start(&[]).await;
    let supervisor = producer.supervisor.clone();
    let tasks = ["publisher (producer)", "publisher (producer: relay)", "relay"];
    wait_until("the tasks run", async || supervisor.running() == tasks).await;
    producer.shutdown.cancel();
    timeout(DEADLINE, producer.run).await.unwrap().unwrap().unwrap();
    assert!(timeout(Duration::ZERO, supervisor.failure()).await.is_err(), "a clean end failed");
}

// Field case 1.8
#[tokio::test]
async fn load_balancer_can_check_health_on_the_callback_port() {
    let producer = Producer::start(&[]).await;
    for path in ["/livez", "/readyz"] {
        for method in ["GET", "HEAD"] {
            let answer = producer.send(producer.request(method, path)).await;
            assert_eq!(answer.status, 200, "{method} {path}");
        }
    }
    // Without broker and spool, the producer accepts no callbacks.
    let nowhere = ["--spool-dir=/dev/null/spool"];
    let producer = Producer::start_at("amqp://127.0.0.1:1", &nowhere).await;
    let answer = producer.send(producer.request("GET", "/readyz")).await;
    assert_eq!((answer.status, &answer.body), (503, &"not ready\n".into()));
    assert_eq!(producer.send(producer.request("GET", "/livez")).await.status, 200);
}

// Field case 1.7
#[tokio::test]
async fn after_sigterm_producer_is_not_ready_but_accepts_callbacks() {
    let queue = Queue::new();
    let system = System::of_producers(&amqp_uri(), &queue);
    let producer = system.start("producer", &[("DRAIN_DELAY", "3s")]).await;
    let address = producer_address(&producer).await;
    let readyz = async || {
        let mut wire = Wire::connect(address).await;
        wire.send("GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n").await;
        wire.reply().await.status
    };
    assert_eq!(readyz().await, 200);
    producer.terminate();
    producer.wait_for_log("no longer ready").await;
    assert_eq!(readyz().await, 503);
    let mut wire = Wire::connect(address).await;
    assert_eq!(wire.post_callback(1).await.status, 200);
    assert_eq!(producer.wait().await.code(), Some(0));
}
