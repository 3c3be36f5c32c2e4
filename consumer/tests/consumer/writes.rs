use service::CancellationToken;
use testbed::{Answer, StatusApi, eventually};

use crate::failures::header;
use crate::{PATIENCE, SECOND, Surroundings};

#[tokio::test]
async fn last_seen_is_the_moment_of_the_answer_by_the_databases_clock() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::After(SECOND, Box::new(Answer::Online)));
    // The write is due 3 s after the answer, so that the two cannot be mistaken for each other.
    let consumer = around.start(&api.endpoint(), &["--write-batch-linger=3s"]);
    around.migrated().await;
    let asked = around.clock().await;
    around.publish([42]).await;
    eventually("the answer has come", PATIENCE, async || {
        (api.lookups_of(42) == 1 && api.in_flight() == 0).then_some(())
    })
    .await;
    let answered = around.clock().await;
    around.recorded([42]).await;
    let written = around.clock().await;
    let last_seen = around.last_seen(42).await;
    assert!(last_seen >= asked + 1.0, "asked at {asked}, last seen at {last_seen}");
    // The status API has sent its answer slightly before the consumer has it.
    assert!(last_seen <= answered + 1.0, "answered at {answered}, last seen at {last_seen}");
    assert!(written >= last_seen + 2.5, "written at {written}, last seen at {last_seen}");
    consumer.stop().await;
}

#[tokio::test]
async fn rows_move_forward_and_those_in_the_future_to_now() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    let consumer = around.start(&api.endpoint(), &[]);
    around.migrated().await;
    let insert = "INSERT INTO object VALUES (1, now() + interval '1 hour'),
                                            (2, now() - interval '1 hour')";
    sqlx::query(insert).execute(around.database.pool()).await.unwrap();
    let (future, older) = (around.last_seen(1).await, around.last_seen(2).await);
    around.publish([1, 2, 3]).await;
    around.recorded([1, 2, 3]).await;
    eventually("both are looked up", PATIENCE, async || {
        (api.lookups_of(1) == 1 && api.lookups_of(2) == 1).then_some(())
    })
    .await;
    consumer.stop().await;
    around.assert_all_settled().await;
    // Field case 4.4.
    assert!(around.last_seen(1).await < future - 3_000.0);
    assert!(around.last_seen(2).await > older + 3_599.0);
}

#[tokio::test]
async fn repeated_messages_of_an_object_give_one_row() {
    let around = Surroundings::new().await;
    let answer = CancellationToken::new();
    let answered = answer.clone();
    let api =
        StatusApi::start(move |_, _| Answer::Once(answered.clone(), Box::new(Answer::Online)));
    around.publish([7; 20]).await;
    around.publish([8, 7, 9]).await;
    let settings = ["--coalesce=off", "--status-timeout=1m", "--write-batch-linger=500ms"];
    let consumer = around.start(&api.endpoint(), &settings);
    eventually("all are being looked up", PATIENCE, async || (api.in_flight() == 23).then_some(()))
        .await;
    // So that one batch has all of them.
    answer.cancel();
    around.recorded([7, 8, 9]).await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn rows_are_written_in_batches() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    around.publish(1..=500).await;
    let consumer = around.start(&api.endpoint(), &["--write-batch-linger=50ms"]);
    around.recorded(1..=500).await;
    let sql = "SELECT count(DISTINCT xmin::text) FROM object";
    let statements: i64 = sqlx::query_scalar(sql).fetch_one(around.database.pool()).await.unwrap();
    assert!(statements < 100, "{statements} statements for 500 rows");
    consumer.stop().await;
}

#[tokio::test]
async fn a_full_batch_does_not_wait_for_the_linger_and_none_is_larger() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    around.publish(1..=100).await;
    let settings = ["--write-batch-max=10", "--write-batch-linger=1m"];
    let consumer = around.start(&api.endpoint(), &settings);
    around.recorded(1..=100).await;
    let sql = "SELECT max(rows) FROM (SELECT count(*) AS rows FROM object GROUP BY xmin::text) _";
    let largest: i64 = sqlx::query_scalar(sql).fetch_one(around.database.pool()).await.unwrap();
    assert_eq!(largest, 10);
    consumer.stop().await;
}

#[tokio::test]
async fn a_row_that_the_database_refuses_is_a_dead_letter_and_the_others_of_its_batch_are_written()
{
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    // All in one batch.
    let consumer = around.start(&api.endpoint(), &["--write-batch-linger=1s"]);
    around.migrated().await;
    let never = "ALTER TABLE object ADD CONSTRAINT never_these CHECK (id NOT IN (3, 77))";
    sqlx::query(never).execute(around.database.pool()).await.unwrap();
    around.publish((1..=100).chain([3])).await;
    around.recorded((1..=100).filter(|id| ![3, 77].contains(id))).await;
    eventually("the dead letters", PATIENCE, async || (around.dead().await == 3).then_some(()))
        .await;
    consumer.stop().await;
    let mut given_up = Vec::new();
    while let Some(letter) = around.queue.get(&around.queue.dead()).await {
        let reason = header(&letter.delivery.properties, "lastseen-reason");
        assert!(reason.contains("never_these"), "{reason}");
        given_up.push(String::from_utf8(letter.delivery.data).unwrap());
    }
    given_up.sort_unstable();
    assert_eq!(given_up, [r#"{"id":3}"#, r#"{"id":3}"#, r#"{"id":77}"#]);
    around.assert_all_settled().await;
}

// Field case 4.2
#[tokio::test]
async fn rows_that_are_held_up_take_no_others_with_them() {
    const HELD_UP: [i64; 3] = [3, 5, 8];
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    let consumer =
        around.start(&api.endpoint(), &["--write-batch-linger=1s", "--max-consumers=40"]);
    around.migrated().await;
    let pool = around.database.pool();
    // A row that is locked, one whose trigger waits for a lock, and one whose trigger is broken.
    let obstacles = "
        INSERT INTO object VALUES (3, now() - interval '1 hour');
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock(5); RETURN NEW; END $$;
        CREATE TRIGGER wait BEFORE INSERT ON object FOR EACH ROW WHEN (NEW.id = 5)
        EXECUTE FUNCTION wait();
        CREATE FUNCTION break() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO missing VALUES (NEW.id); RETURN NEW; END $$;
        CREATE TRIGGER break BEFORE INSERT ON object FOR EACH ROW WHEN (NEW.id = 8)
        EXECUTE FUNCTION break()";
    sqlx::raw_sql(obstacles).execute(pool).await.unwrap();
    let mut other = pool.begin().await.unwrap();
    let lock = "SELECT pg_advisory_xact_lock(5) FROM object WHERE id = 3 FOR UPDATE";
    sqlx::query(lock).execute(&mut *other).await.unwrap();

    around.publish(1..=50).await;
    let not_written = "SELECT count(*) FROM generate_series(1, 50) AS id WHERE id <> ALL ($1)
                       AND NOT EXISTS (SELECT FROM object WHERE object.id = id.id
                                       AND last_seen > now() - interval '5 min')";
    let are_written = async |except: &[i64]| {
        eventually("the rows are written", PATIENCE, async || {
            let left = sqlx::query_scalar(not_written).bind(except).fetch_one(pool);
            let left: i64 = left.await.unwrap();
            (left == 0).then_some(())
        })
        .await;
    };
    are_written(&HELD_UP).await;
    // Others come through after them, too.
    around.publish((51..=90).chain(HELD_UP)).await;
    eventually("later rows are written", PATIENCE, async || {
        around.rows().await.contains(&90).then_some(())
    })
    .await;
    eventually("the consumer is ready", PATIENCE, async || {
        consumer.missing().is_empty().then_some(())
    })
    .await;
    sqlx::query("CREATE TABLE missing (id bigint)").execute(pool).await.unwrap();
    other.rollback().await.unwrap();
    are_written(&[]).await;
    consumer.stop().await;
    around.assert_all_settled().await;
}

#[tokio::test]
async fn a_consumer_that_stops_gives_back_what_is_held_up() {
    let around = Surroundings::new().await;
    let api = StatusApi::start(|_, _| Answer::Online);
    let consumer = around.start(&api.endpoint(), &[]);
    around.migrated().await;
    let mut other = around.database.pool().begin().await.unwrap();
    // A row that is not there for others yet.
    sqlx::query("INSERT INTO object VALUES (1, now())").execute(&mut *other).await.unwrap();
    around.publish(1..=2).await;
    around.recorded([2]).await;
    eventually("row 1 was tried", PATIENCE, async || (api.lookups_of(1) == 1).then_some(())).await;
    consumer.stop().await;
    assert_eq!(around.waiting().await, 1);
}
