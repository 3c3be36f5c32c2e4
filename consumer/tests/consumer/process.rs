use std::net::SocketAddr;
use std::time::{Duration, Instant};

use testkit::{Answer, Process, StatusApi, System, free_port, http_get, wait_for, wait_until};

use crate::{CALLBACK_ID, SECOND, TestEnv};

/// The exit codes for a bad setting, and for a process that did not finish its work.
const BAD_SETTING: i32 = 78;
const FAILURE: i32 = 70;

pub(crate) fn spawn(env: &TestEnv, api: &StatusApi, further: &[(&'static str, &str)]) -> Process {
    System::new(&env.queue, &env.database, &api.endpoint()).spawn("consumer", further)
}

/// A consumer with one lookup in flight, which ends after a minute.
async fn with_a_hanging_lookup(env: &TestEnv, api: &StatusApi, drain_timeout: &str) -> Process {
    let settings = [("STATUS_TIMEOUT", "60s"), ("DRAIN_TIMEOUT", drain_timeout)];
    let consumer = spawn(env, api, &settings);
    env.publish([42]).await;
    wait_until("the lookup is in flight", async || api.in_flight() == 1).await;
    consumer
}

#[tokio::test]
async fn a_bad_setting_is_rejected_with_what_is_allowed() {
    let consumer = Process::spawn("consumer", &[("MAX_CONSUMERS", "0".to_owned())], &[]);
    assert_eq!(consumer.wait().await.code(), Some(BAD_SETTING));
    let log = consumer.log().join("\n");
    assert!(log.contains("MAX_CONSUMERS=0: expected a whole number from 1 to 50000"), "{log}");
}

#[tokio::test]
async fn a_malformed_uri_is_rejected_without_showing_its_password() {
    for (name, value) in [
        ("AMQP_URI", "amqp://me:s3cret@host:port/x"),
        ("AMQP_URI", "me:s3cret@host"),
        ("AMQP_URI", "amqp://me:s3cret/@host:5672"),
        ("AMQP_URI", "amqp://me:s3cret@a:5672,me:s3cret@b:5672/x"),
        ("AMQP_URI", "amqp://me:s3cret%zz@host/x"),
        ("DATABASE_URL", "postgres://me:s3cret@host:port/x"),
        ("DATABASE_URL", "postgres://me:s3cret@a:5432,me:s3cret@b:5432/x"),
    ] {
        let consumer = Process::spawn("consumer", &[(name, value.to_owned())], &[]);
        assert_eq!(consumer.wait().await.code(), Some(BAD_SETTING), "{value}");
        let log = consumer.log().join("\n");
        assert!(log.contains(&format!("{name}=")), "{log}");
        assert!(!log.contains("s3cret"), "{log}");
    }
}

#[tokio::test]
async fn contradictory_settings_are_rejected_with_their_sources() {
    for (environment, error) in [
        (
            [("POSTGRES_HOST", "a,b"), ("POSTGRES_PORT", "1,2,3")],
            "as there are hosts in POSTGRES_HOST=a,b (POSTGRES_PORT is set in the environment; \
             POSTGRES_HOST is set in the environment)",
        ),
        (
            [("AMQP_URI", "sqlite:queue.db"), ("SHARDS", "4")],
            "SHARDS=4: expected 1, because a queue in a file has no shards",
        ),
    ] {
        let environment = environment.map(|(name, value)| (name, value.to_owned()));
        let consumer = Process::spawn("consumer", &environment, &[]);
        assert_eq!(consumer.wait().await.code(), Some(BAD_SETTING), "{environment:?}");
        let log = consumer.log().join("\n");
        assert!(log.contains(error), "{log}");
    }
}

// Field case 5.2.
#[tokio::test]
async fn an_endpoint_with_a_query_is_rejected_without_showing_it() {
    let first = ("TESTER_ENDPOINT", "http://api");
    for (name, value) in [
        ("TESTER_ENDPOINT", "http://api/v1?key=s3cret"),
        ("STATUS_API", "http://api/v1#s3cret"),
        ("STATUS_API", "http://me:s3cret@other-api"),
    ] {
        let environment = [first, (name, value)].map(|(name, value)| (name, value.to_owned()));
        let consumer = Process::spawn("consumer", &environment, &[]);
        assert_eq!(consumer.wait().await.code(), Some(BAD_SETTING), "{value}");
        let log = consumer.log().join("\n");
        assert!(log.contains(name), "{log}");
        assert!(!log.contains("s3cret"), "{log}");
    }
}

#[tokio::test]
async fn an_idle_consumer_exits_with_0_on_sigterm() {
    let (env, api) = TestEnv::with_all_online().await;
    let consumer = spawn(&env, &api, &[]);
    env.publish([42]).await;
    env.wait_until_recorded([42]).await;
    consumer.stop().await;
    env.assert_all_settled().await;
}

#[tokio::test]
async fn a_consumer_without_dependencies_is_never_ready() {
    let unused = free_port();
    let admin = SocketAddr::from(([127, 0, 0, 1], free_port()));
    let settings = [
        ("ADMIN_ADDR", admin.to_string()),
        ("AMQP_URI", format!("amqp://guest:guest@127.0.0.1:{unused}/%2f")),
        ("DATABASE_URL", format!("postgres://nobody@127.0.0.1:{unused}/x")),
        ("TESTER_ENDPOINT", format!("http://127.0.0.1:{unused}")),
    ];
    let consumer = Process::spawn("consumer", &settings, &[]);
    let first =
        wait_for("the admin address answers", async || http_get(admin, "/readyz").await.ok()).await;
    assert_eq!(first.status, 503, "{}", first.body);
    let metrics = http_get(admin, "/metrics").await.unwrap().body;
    assert!(metrics.contains("\nlastseen_ready{role=\"consumer\"} 0\n"), "{metrics}");
    // At first, the healthcheck may only report that the process is starting.
    wait_until("the healthcheck names the database", async || {
        let healthcheck = Process::spawn("consumer", &settings, &["healthcheck"]);
        assert_eq!(healthcheck.wait().await.code(), Some(1));
        healthcheck.log().join("\n").contains("database: ")
    })
    .await;
    for line in ["no broker", "no database", "no status API"] {
        consumer.wait_for_log(line).await;
    }
}

#[tokio::test]
async fn a_second_sigterm_ends_the_drain_at_once() {
    let (env, api) = TestEnv::with_answer(Answer::Hang).await;
    let consumer = with_a_hanging_lookup(&env, &api, "60s").await;
    consumer.terminate();
    consumer.wait_for_log("draining").await;
    assert!(consumer.is_running());
    // Signals within 200 ms of the first one count as the same.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let second_signal = Instant::now();
    consumer.terminate();
    assert_eq!(consumer.wait().await.code(), Some(FAILURE));
    assert!(second_signal.elapsed() < Duration::from_secs(10), "{:?}", second_signal.elapsed());
    wait_until("the message is in the queue again", async || env.ready().await == 1).await;
}

#[tokio::test]
async fn a_drain_ends_at_its_timeout_and_messages_are_redelivered() {
    let (env, api) = TestEnv::with_answer(Answer::Hang).await;
    let consumer = with_a_hanging_lookup(&env, &api, "1s").await;
    let signalled = Instant::now();
    consumer.terminate();
    assert_eq!(consumer.wait().await.code(), Some(FAILURE));
    assert!(signalled.elapsed() >= SECOND, "{:?}", signalled.elapsed());
    let log = consumer.log().join("\n");
    assert!(log.contains("the drain took longer than DRAIN_TIMEOUT=1s"), "{log}");
    wait_until("the message is in the queue again", async || env.ready().await == 1).await;
}

#[tokio::test]
async fn the_log_of_a_lookup_has_the_callback_id() {
    let (env, api) = TestEnv::with_all_online().await;
    let consumer = spawn(&env, &api, &[("RUST_LOG", "info,consumer=debug")]);
    env.publish([42]).await;
    let line = consumer.wait_for_log(CALLBACK_ID).await;
    assert!(line.contains("looked up") && line.contains("id=42"), "{line}");
    env.wait_until_recorded([42]).await;
}
