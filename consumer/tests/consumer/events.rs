use lapin::ExchangeKind;
use lapin::options::ExchangeDeclareOptions;
use lapin::types::FieldTable;
use messaging::amqp::Access;
use messaging::events::{Exchange, Kind, Notification, Subscriber};
use std::time::SystemTime;

use testkit::{Answer, StatusApi, wait_for, wait_until};
use tokio::time::timeout;

use crate::{PATIENCE, RunningConsumer, SECOND, TestEnv};

/// A subscriber of the events of the queue.
pub(crate) async fn subscriber(env: &TestEnv) -> Subscriber {
    let uri = testkit::amqp_uri().parse().unwrap();
    let exchange = Exchange::on_rabbitmq(Access { uri, authorities: None }, &env.queue.name);
    let mut subscriber = Subscriber::new(&exchange, "test subscriber");
    assert!(matches!(next(&mut subscriber).await, Notification::Missed(_)));
    subscriber
}

pub(crate) async fn next(subscriber: &mut Subscriber) -> Notification {
    timeout(PATIENCE, subscriber.next()).await.expect("an event should arrive")
}

/// Waits until the consumer is ready and can also publish events. It can be ready without the
/// latter.
pub(crate) async fn wait_until_nothing_is_away(consumer: &RunningConsumer) {
    wait_until("the consumer can publish events", async || {
        consumer.missing().is_empty() && consumer.health.missing_optional().is_empty()
    })
    .await;
}

/// The next event about an object: its kind, the id, and `last_seen` in microseconds.
async fn next_change(subscriber: &mut Subscriber) -> (Kind, i64, u128) {
    loop {
        // Skips gaps, which the consumer announces if it dropped events before it was connected.
        let Notification::Committed(kind, objects) = next(subscriber).await else { continue };
        let since_1970 = objects[0].last_seen.duration_since(std::time::UNIX_EPOCH).unwrap();
        return (kind, objects[0].id, since_1970.as_micros());
    }
}

#[tokio::test]
async fn events_have_the_last_seen_of_the_table() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, _| if id == 42 { Answer::Online } else { Answer::Offline });
    let mut subscriber = subscriber(&env).await;
    let consumer = env.start(&api.endpoint(), &[]);
    wait_until_nothing_is_away(&consumer).await;
    let in_the_table = async || {
        let sql = "SELECT (extract(epoch FROM last_seen) * 1000000)::bigint FROM object";
        let micros: i64 = sqlx::query_scalar(sql).fetch_one(env.database.pool()).await.unwrap();
        u128::try_from(micros).unwrap()
    };
    for kind in [Kind::Online, Kind::Seen, Kind::Seen] {
        env.publish([7, 42]).await;
        assert_eq!(next_change(&mut subscriber).await, (kind, 42, in_the_table().await));
    }
    consumer.stop().await;
}

/// The next event about one object: its name and the id.
pub(crate) async fn next_event(subscriber: &mut Subscriber) -> (&'static str, i64) {
    loop {
        match next(subscriber).await {
            Notification::Committed(kind, objects) => return (kind.name(), objects[0].id),
            Notification::GivenUp(objects) => return ("given up", objects[0].id),
            // The consumer announces a gap if it dropped events before it was connected.
            Notification::Missed(_) => {}
        }
    }
}

#[tokio::test]
async fn object_is_announced_as_given_up_after_its_last_attempt_only() {
    let env = TestEnv::new().await;
    let api = StatusApi::start(|id, lookup| match (id, lookup) {
        (42, _) | (43, 1) => Answer::Status(500),
        (43.., _) => Answer::Online,
        _ => Answer::Offline,
    });
    let mut subscriber = subscriber(&env).await;
    let consumer = env.start(&api.endpoint(), &["--max-attempts=2"]);
    wait_until_nothing_is_away(&consumer).await;
    env.queue.publish_raw(b"not json").await;
    env.publish([42, 43]).await;
    // A failure counts only while the API answers other lookups.
    let answered = async {
        loop {
            env.publish([1]).await;
            tokio::time::sleep(SECOND / 10).await;
        }
    };
    let before = SystemTime::now();
    let given_up = async {
        loop {
            match next(&mut subscriber).await {
                Notification::GivenUp(objects) => break objects,
                Notification::Committed(Kind::Online, objects) => assert_eq!(objects[0].id, 43),
                other @ Notification::Committed(..) => panic!("{other:?}"),
                Notification::Missed(_) => {}
            }
        }
    };
    let given_up = tokio::select! {
        given_up = given_up => given_up,
        () = answered => unreachable!("it never ends"),
    };
    assert_eq!((given_up.len(), given_up[0].id), (1, 42));
    let at = given_up[0].at;
    assert!(before - SECOND < at && at <= SystemTime::now(), "{at:?}");
    assert!(api.lookups_of(42) >= 2, "the first failure should be retried");
    for _ in 0..2 {
        let letter = env.queue.get(&env.queue.dead()).await;
        assert!(letter.is_some(), "the event came before the dead letters");
    }

    // Nothing else was published: 43 was only retried, and the undecodable message has no object.
    env.publish([44]).await;
    let mut event = next_event(&mut subscriber).await;
    if event == ("online", 43) {
        event = next_event(&mut subscriber).await;
    }
    assert_eq!(event, ("online", 44));
    consumer.stop().await;
}

#[tokio::test]
async fn unpublishable_events_only_add_a_line_to_the_readiness() {
    let (env, api) = TestEnv::with_all_online().await;
    let connection = testkit::connect(&testkit::amqp_uri()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    // The consumer declares an exchange of this name with another type, which fails now.
    let name = format!("{}.events", env.queue.name);
    let options = ExchangeDeclareOptions::default();
    let declared =
        channel.exchange_declare(name.into(), ExchangeKind::Fanout, options, FieldTable::default());
    declared.await.unwrap();
    let consumer = env.start(&api.endpoint(), &[]);
    env.publish(1..=500).await;
    env.wait_until_recorded(1..=500).await;
    assert!(consumer.missing().is_empty());
    wait_for("the readiness reports it", async || {
        let away = consumer.health.missing_optional();
        away.iter().find(|(dependency, reason)| {
            *dependency == "events" && reason.contains("inequivalent")
        })?;
        Some(())
    })
    .await;
    env.drain(consumer).await;
}

// Field case 4.5
#[tokio::test]
async fn a_commit_whose_outcome_is_lost_leaves_a_gap() {
    let (env, api) = TestEnv::with_all_online().await;
    let mut subscriber = subscriber(&env).await;
    let (proxy, database) = env.database_proxy().await;
    let consumer = env.start(&api.endpoint(), &[&database]);
    wait_until_nothing_is_away(&consumer).await;
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;
                CREATE TRIGGER slow AFTER INSERT ON object FOR EACH ROW EXECUTE FUNCTION slow()";
    sqlx::raw_sql(slow).execute(env.database.pool()).await.unwrap();
    env.publish([42]).await;
    wait_until("the statement runs", async || {
        let sleeping = "SELECT count(*) FROM pg_stat_activity
                        WHERE datname = current_database() AND wait_event = 'PgSleep'";
        let sleeping = sqlx::query_scalar(sleeping).fetch_one(env.database.pool());
        let sleeping: i64 = sleeping.await.unwrap();
        sleeping > 0
    })
    .await;
    // The database commits although its client is disconnected.
    proxy.cut();
    env.wait_until_recorded([42]).await;
    proxy.restore();
    loop {
        match next(&mut subscriber).await {
            Notification::Missed(reason) => {
                break assert!(reason.contains("are missing"), "{reason}");
            }
            Notification::Committed(kind, objects) => {
                assert_ne!(
                    kind,
                    Kind::Online,
                    "{objects:?} was published although its outcome was lost"
                );
            }
            other @ Notification::GivenUp(_) => panic!("{other:?}"),
        }
    }
    consumer.stop().await;
}
