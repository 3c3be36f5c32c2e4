//! Status APIs that close connections that the consumer keeps open.

use std::net::SocketAddr;

use testkit::{
    Authority, Connections, Http2Api, Http2Lookup, PlainStatusApi, Process, TlsProxy, wait_until,
};
use tokio::time::sleep;

use crate::{SECOND, TestEnv};

async fn start(connections: Connections) -> (TestEnv, PlainStatusApi) {
    (TestEnv::new().await, PlainStatusApi::start(connections, |_| None))
}

/// Publishes 20 ids, and runs a consumer with at most `max_lookups` lookups in flight. If that is
/// one, all lookups use the same connection while it stays open.
async fn assert_no_lookup_fails(connections: Connections, max_lookups: u32) {
    let (env, server) = start(connections).await;
    env.publish(1..=20).await;
    let environment = [
        ("AMQP_URI", testkit::amqp_uri()),
        ("QUEUE_NAME", env.queue.name.clone()),
        ("DATABASE_URL", env.database.url().to_owned()),
        ("STATUS_API", server.endpoint()),
        ("MAX_CONSUMERS", max_lookups.to_string()),
    ];
    let consumer = Process::spawn("consumer", &environment, &[]);
    env.wait_until_recorded(1..=20).await;
    let failed = consumer.metric("lastseen_lookups_total{outcome=\"transport\"}").await;
    consumer.stop().await;
    env.assert_all_settled().await;
    assert!(failed < 0.5, "{failed} lookups failed");
    // Each lookup but the first may meet one connection that was closed.
    assert!((20..40).contains(&server.requests()), "{} requests", server.requests());
}

// Field case 3.9.
#[tokio::test]
async fn a_lookup_on_a_connection_that_just_ended_is_sent_again() {
    assert_no_lookup_fails(Connections::CloseAtSecondRequest, 1).await;
    // With eight, the server may have closed several idle connections. The lookup must not be sent
    // again on one of these.
    assert_no_lookup_fails(Connections::CloseAtSecondRequest, 8).await;
}

// Field case 3.9.
#[tokio::test]
async fn an_api_that_closes_after_each_response_fails_no_lookup() {
    assert_no_lookup_fails(Connections::CloseAfterResponse, 1).await;
}

// Field case 3.9.
#[tokio::test]
async fn a_connection_idle_for_almost_a_second_is_not_reused() {
    let (env, server) = start(Connections::StayOpen).await;
    let consumer = env.start(&server.endpoint(), &[]);
    env.publish([1]).await;
    env.wait_until_recorded([1]).await;
    // A little longer than the consumer keeps idle connections. Together with the time of the
    // lookups, it is still less than a second.
    sleep(SECOND * 6 / 10).await;
    env.publish([2]).await;
    env.wait_until_recorded([1, 2]).await;
    assert_eq!(server.connections(), 2);
    consumer.stop().await;
}

/// A fresh connection was not closed for being idle, so the API is at fault.
#[tokio::test]
async fn a_fresh_connection_that_ends_is_a_failed_lookup() {
    let (env, server) = start(Connections::CloseAtFirstRequest).await;
    env.publish([1]).await;
    let consumer = env.start(&server.endpoint(), &[]);
    wait_until("a lookup", async || server.requests() > 0).await;
    // A lookup that is sent again would arrive at once; the next attempt comes after a second.
    sleep(SECOND / 2).await;
    assert_eq!(server.requests(), 1);
    consumer.stop().await;
}

/// Runs a consumer that trusts `authority`, and looks up objects at `https://{host}`.
fn look_up_by_https(
    env: &TestEnv,
    host: &str,
    server: SocketAddr,
    authority: &Authority,
) -> Process {
    let environment = [
        ("AMQP_URI", testkit::amqp_uri()),
        ("QUEUE_NAME", env.queue.name.clone()),
        ("DATABASE_URL", env.database.url().to_owned()),
        ("STATUS_API", format!("https://{host}:{}", server.port())),
        ("SSL_CERT_FILE", authority.file().display().to_string()),
    ];
    Process::spawn("consumer", &environment, &[])
}

#[tokio::test]
async fn an_https_api_needs_a_trusted_certificate_for_its_name() {
    let (env, server) = start(Connections::StayOpen).await;
    let authority = Authority::new();
    let proxy = TlsProxy::start(&authority, server.address()).await;
    for (host, trusted, reason) in [
        ("127.0.0.1", &authority, "not valid for name"),
        ("localhost", &Authority::new(), "invalid peer certificate"),
    ] {
        env.publish([1]).await;
        let consumer = look_up_by_https(&env, host, proxy.address(), trusted);
        consumer.wait_for_log(reason).await;
        consumer.stop().await;
    }
    assert_eq!(server.requests(), 0);
    env.publish([1]).await;
    let consumer = look_up_by_https(&env, "localhost", proxy.address(), &authority);
    env.wait_until_recorded([1]).await;
    consumer.stop().await;
}

#[tokio::test]
async fn lookups_share_a_connection_if_the_api_offers_http2() {
    let env = TestEnv::new().await;
    let authority = Authority::new();
    let mut server = Http2Api::start(&authority, None).await;
    env.publish(1..=20).await;
    let consumer = look_up_by_https(&env, "localhost", server.address(), &authority);
    let mut lookups = Vec::new();
    for _ in 1..=20 {
        lookups.push(server.next().await);
    }
    assert_eq!(server.open_connections(), 1);
    lookups.into_iter().for_each(Http2Lookup::answer);
    env.wait_until_recorded(1..=20).await;
    consumer.stop().await;
    env.assert_all_settled().await;
}
