use testbed::eventually;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::front_door::{DEADLINE, Producer, assert_problem_body};
use crate::wire::Wire;

#[tokio::test]
async fn a_connection_that_sends_half_a_head_or_idles_is_closed_after_the_header_timeout() {
    let producer = Producer::start(&["--header-timeout=300ms"]).await;
    let mut half = Wire::connect(producer.address).await;
    half.send("POST /callback HTTP/1.1\r\nHost:").await;
    half.closed().await;

    let mut idle = Wire::connect(producer.address).await;
    idle.send_callback(1).await;
    assert_eq!(idle.reply().await.status, 200);
    idle.closed().await;
}

#[tokio::test]
async fn a_body_that_stalls_is_answered_408() {
    let producer = Producer::start(&["--body-timeout=300ms"]).await;
    let mut wire = Wire::connect(producer.address).await;
    wire.send("POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\n\r\n{\"object_ids\"")
        .await;
    let reply = wire.reply().await;
    assert_eq!(reply.status, 408, "{reply:?}");
    assert!(reply.head.contains("content-type: application/problem+json\r\n"), "{reply:?}");
    assert!(assert_problem_body(&reply.body, 408).contains("300ms"), "{reply:?}");
    producer.assert_nothing_queued().await;
}

#[tokio::test]
async fn a_client_beyond_the_most_connections_is_served_once_another_has_gone() {
    let producer = Producer::start(&["--max-connections=1"]).await;
    let mut first = Wire::connect(producer.address).await;
    first.send_callback(1).await;
    assert_eq!(first.reply().await.status, 200);

    let mut second = Wire::connect(producer.address).await;
    second.send_callback(2).await;
    for _ in 0..50 {
        first.send_callback(3).await;
        assert_eq!(first.reply().await.status, 200);
        assert!(second.is_silent());
    }
    drop(first);
    assert_eq!(second.reply().await.status, 200);
}

#[tokio::test]
async fn a_request_in_flight_at_the_shutdown_is_still_answered() {
    let mut producer = Producer::start(&[]).await;
    let mut in_flight = Wire::connect(producer.address).await;
    let head =
        "POST /callback HTTP/1.1\r\nHost: x\r\nContent-Length: 18\r\nExpect: 100-continue\r\n\r\n";
    in_flight.send(head).await;
    // It says so when it begins to read the body.
    assert_eq!(in_flight.reply().await.status, 100);

    producer.shutdown.cancel();
    eventually("no new connections are taken", DEADLINE, async || {
        TcpStream::connect(producer.address).await.err()
    })
    .await;
    assert!(!producer.served.is_finished());
    in_flight.send(r#"{"object_ids":[5]}"#).await;
    assert_eq!(in_flight.reply().await.status, 200);
    let served = timeout(DEADLINE, &mut producer.served).await.unwrap().unwrap();
    assert!(served.is_ok(), "{served:?}");
    assert_eq!(producer.ids().await, [5]);
}
