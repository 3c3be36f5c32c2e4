use ::events::{Exchange, Kind, Notice, Subscriber};
use amqp::Access;
use lapin::ExchangeKind;
use lapin::options::ExchangeDeclareOptions;
use lapin::types::FieldTable;
use testbed::{Answer, StatusApi, eventually};
use tokio::time::timeout;

use crate::{PATIENCE, Surroundings};

/// Hears all that is told about the queue.
async fn subscriber(around: &Surroundings) -> Subscriber {
    let uri = testbed::amqp_uri().parse().unwrap();
    let exchange = Exchange::on(Access { uri, authorities: None }, &around.queue.name);
    let mut subscriber = Subscriber::new(&exchange, "test subscriber");
    assert!(matches!(next(&mut subscriber).await, Notice::Missed(_)));
    subscriber
}

async fn next(subscriber: &mut Subscriber) -> Notice {
    timeout(PATIENCE, subscriber.next()).await.expect("there should be news")
}

/// The next news of an object: what became of it, and its `last_seen` in microseconds.
async fn news(subscriber: &mut Subscriber) -> (Kind, i64, u128) {
    loop {
        // The consumer connects at its own time, and says if it has dropped something before.
        let Notice::Committed(kind, objects) = next(subscriber).await else { continue };
        let since_1970 = objects[0].last_seen.duration_since(std::time::UNIX_EPOCH).unwrap();
        return (kind, objects[0].id, since_1970.as_micros());
    }
}

#[tokio::test]
async fn what_is_committed_is_told_as_it_is_in_the_table() {
    let around = Surroundings::new().await;
    let mut subscriber = subscriber(&around).await;
    let api = StatusApi::start(|id, _| if id == 42 { Answer::Online } else { Answer::Offline });
    let consumer = around.start(&api.endpoint(), &[]);
    eventually("the consumer can tell", PATIENCE, async || {
        let away = consumer.health.done_without();
        (consumer.missing().is_empty() && away.is_empty()).then_some(())
    })
    .await;
    let in_the_table = async || {
        let sql = "SELECT (extract(epoch FROM last_seen) * 1000000)::bigint FROM object";
        let micros: i64 = sqlx::query_scalar(sql).fetch_one(around.database.pool()).await.unwrap();
        u128::try_from(micros).unwrap()
    };
    for kind in [Kind::Online, Kind::Seen, Kind::Seen] {
        around.publish([7, 42]).await;
        assert_eq!(news(&mut subscriber).await, (kind, 42, in_the_table().await));
    }
    consumer.stop().await;
}

#[tokio::test]
async fn events_that_cannot_be_told_change_nothing_but_a_line_of_the_readiness() {
    let around = Surroundings::new().await;
    let connection = testbed::connect(&testbed::amqp_uri()).await.unwrap();
    let channel = connection.create_channel().await.unwrap();
    // Somebody else's: it cannot be had as it should be.
    let name = format!("{}.events", around.queue.name);
    let options = ExchangeDeclareOptions::default();
    let declared =
        channel.exchange_declare(name.into(), ExchangeKind::Fanout, options, FieldTable::default());
    declared.await.unwrap();
    let api = StatusApi::start(|_, _| Answer::Online);
    let consumer = around.start(&api.endpoint(), &[]);
    around.publish(1..=500).await;
    around.recorded(1..=500).await;
    assert!(consumer.missing().is_empty());
    eventually("the readiness says so", PATIENCE, async || {
        let away = consumer.health.done_without();
        away.iter().find(|(what, why)| *what == "events" && why.contains("inequivalent"))?;
        Some(())
    })
    .await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

// Field case 4.5
#[tokio::test]
async fn a_commit_whose_outcome_is_lost_leaves_a_gap() {
    let around = Surroundings::new().await;
    let mut subscriber = subscriber(&around).await;
    let api = StatusApi::start(|_, _| Answer::Online);
    let (proxy, database) = around.database_proxy().await;
    let consumer = around.start(&api.endpoint(), &[&database]);
    eventually("the consumer can announce", PATIENCE, async || {
        let away = consumer.health.done_without();
        (consumer.missing().is_empty() && away.is_empty()).then_some(())
    })
    .await;
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN PERFORM pg_sleep(1); RETURN NULL; END $$;
                CREATE TRIGGER slow AFTER INSERT ON object FOR EACH ROW EXECUTE FUNCTION slow()";
    sqlx::raw_sql(slow).execute(around.database.pool()).await.unwrap();
    around.publish([42]).await;
    eventually("the statement is under way", PATIENCE, async || {
        let sleeping = "SELECT count(*) FROM pg_stat_activity
                        WHERE datname = current_database() AND wait_event = 'PgSleep'";
        let sleeping = sqlx::query_scalar(sleeping).fetch_one(around.database.pool());
        let sleeping: i64 = sleeping.await.unwrap();
        (sleeping > 0).then_some(())
    })
    .await;
    // The server goes on without its client, and commits.
    proxy.cut();
    around.recorded([42]).await;
    proxy.restore();
    loop {
        match next(&mut subscriber).await {
            Notice::Missed(why) => break assert!(why.contains("are missing"), "{why}"),
            Notice::Committed(kind, objects) => {
                assert_ne!(kind, Kind::Online, "{objects:?} was announced after all");
            }
        }
    }
    consumer.stop().await;
}
