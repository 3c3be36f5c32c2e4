use std::time::Instant;

use testkit::{Answer, StatusApi, wait_until};

use crate::failures::header;
use crate::{SECOND, TestEnv};

#[tokio::test]
async fn last_seen_is_the_time_of_the_answer_by_the_databases_clock() {
    let (env, api) = TestEnv::with_answer(Answer::Online.after(SECOND)).await;
    // The write is due 3 s after the answer, so that their times differ clearly.
    let consumer = env.start(&api.endpoint(), &["--write-batch-linger=3s"]);
    env.wait_until_migrated().await;
    let started = env.clock().await;
    env.publish([42]).await;
    wait_until("the lookup is answered", async || api.lookups_of(42) == 1 && api.in_flight() == 0)
        .await;
    let answered = env.clock().await;
    env.wait_until_recorded([42]).await;
    let written = env.clock().await;
    let last_seen = env.last_seen(42).await;
    assert!(last_seen >= started + 1.0, "started at {started}, last seen at {last_seen}");
    // The consumer receives the answer slightly after the status API has sent it.
    assert!(last_seen <= answered + 1.0, "answered at {answered}, last seen at {last_seen}");
    assert!(written >= last_seen + 2.5, "written at {written}, last seen at {last_seen}");
    consumer.stop().await;
}

#[tokio::test]
async fn a_last_seen_in_the_past_or_in_the_future_becomes_now() {
    let (env, api) = TestEnv::with_all_online().await;
    let consumer = env.start(&api.endpoint(), &[]);
    env.wait_until_migrated().await;
    let insert = "INSERT INTO object VALUES (1, now() + interval '1 hour'),
                                            (2, now() - interval '1 hour')";
    sqlx::query(insert).execute(env.database.pool()).await.unwrap();
    let (future, older) = (env.last_seen(1).await, env.last_seen(2).await);
    env.publish([1, 2, 3]).await;
    env.wait_until_recorded([1, 2, 3]).await;
    wait_until("objects 1 and 2 are looked up", async || {
        api.lookups_of(1) == 1 && api.lookups_of(2) == 1
    })
    .await;
    env.drain(consumer).await;
    // Field case 4.4.
    assert!(env.last_seen(1).await < future - 3_000.0);
    assert!(env.last_seen(2).await > older + 3_599.0);
}

#[tokio::test]
async fn repeated_messages_of_an_object_make_one_row() {
    let env = TestEnv::new().await;
    let (api, answer) = StatusApi::gated();
    env.publish([7; 20]).await;
    env.publish([8, 7, 9]).await;
    let settings = ["--coalesce=off", "--status-timeout=1m", "--write-batch-linger=500ms"];
    let consumer = env.start(&api.endpoint(), &settings);
    wait_until("all are being looked up", async || api.in_flight() == 23).await;
    // All results arrive within WRITE_BATCH_LINGER, so one batch has all 21 results of
    // object 7.
    answer.cancel();
    env.wait_until_recorded([7, 8, 9]).await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn rows_are_written_in_batches() {
    let (env, api) = TestEnv::with_all_online().await;
    env.publish(1..=500).await;
    let consumer = env.start(&api.endpoint(), &["--write-batch-linger=50ms"]);
    env.wait_until_recorded(1..=500).await;
    let sql = "SELECT count(DISTINCT xmin::text) FROM object";
    let statements: i64 = sqlx::query_scalar(sql).fetch_one(env.database.pool()).await.unwrap();
    assert!(statements < 100, "{statements} statements for 500 rows");
    consumer.stop().await;
}

#[tokio::test]
async fn no_batch_exceeds_the_maximum_and_a_full_one_does_not_wait() {
    let (env, api) = TestEnv::with_all_online().await;
    env.publish(1..=100).await;
    let settings = ["--write-batch-max=10", "--write-batch-linger=1m"];
    let consumer = env.start(&api.endpoint(), &settings);
    env.wait_until_recorded(1..=100).await;
    let sql = "SELECT max(rows) FROM (SELECT count(*) AS rows FROM object GROUP BY xmin::text) _";
    let largest: i64 = sqlx::query_scalar(sql).fetch_one(env.database.pool()).await.unwrap();
    assert_eq!(largest, 10);
    consumer.stop().await;
}

#[tokio::test]
async fn a_drain_does_not_wait_for_a_batch_to_fill_up() {
    let (env, api) = TestEnv::with_all_online().await;
    let consumer = env.start(&api.endpoint(), &["--write-batch-linger=1m"]);
    env.publish([42]).await;
    wait_until("the lookup is answered", async || api.lookups_of(42) == 1 && api.in_flight() == 0)
        .await;
    let stopped_at = Instant::now();
    env.drain(consumer).await;
    assert!(stopped_at.elapsed() < SECOND * 30, "{:?}", stopped_at.elapsed());
    env.wait_until_recorded([42]).await;
}

#[tokio::test]
async fn a_refused_row_is_a_dead_letter_and_its_batch_is_written() {
    let (env, api) = TestEnv::with_all_online().await;
    // The linger is long enough for all results to be in one batch.
    let consumer = env.start(&api.endpoint(), &["--write-batch-linger=1s"]);
    env.wait_until_migrated().await;
    let never = "ALTER TABLE object ADD CONSTRAINT never_these CHECK (id NOT IN (3, 77))";
    sqlx::query(never).execute(env.database.pool()).await.unwrap();
    env.publish((1..=100).chain([3])).await;
    env.wait_until_recorded((1..=100).filter(|id| ![3, 77].contains(id))).await;
    wait_until("the dead letters", async || env.dead_letters().await == 3).await;
    consumer.stop().await;
    let mut letters = Vec::new();
    while let Some(letter) = env.queue.get(&env.queue.dead()).await {
        let reason = header(&letter.delivery.properties, "lastseen-reason");
        assert!(reason.contains("never_these"), "{reason}");
        letters.push(String::from_utf8(letter.delivery.data).unwrap());
    }
    letters.sort_unstable();
    assert_eq!(letters, [r#"{"id":3}"#, r#"{"id":3}"#, r#"{"id":77}"#]);
    env.assert_all_settled().await;
}

// Field case 4.2
#[tokio::test]
async fn held_up_rows_do_not_delay_other_rows() {
    const HELD_UP: [i64; 3] = [3, 5, 8];
    let (env, api) = TestEnv::with_all_online().await;
    let consumer = env.start(&api.endpoint(), &["--write-batch-linger=1s", "--max-consumers=40"]);
    env.wait_until_migrated().await;
    let pool = env.database.pool();
    // Row 3 is locked, the trigger of row 5 waits for a lock, and the trigger of row 8 fails.
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
    let both_locks = "SELECT pg_advisory_xact_lock(5) FROM object WHERE id = 3 FOR UPDATE";
    sqlx::query(both_locks).execute(&mut *other).await.unwrap();

    env.publish(1..=50).await;
    let not_written = "SELECT count(*) FROM generate_series(1, 50) AS published (id)
                       WHERE id <> ALL ($1)
                       AND NOT EXISTS (SELECT FROM object WHERE object.id = published.id
                                       AND last_seen > now() - interval '5 min')";
    let wait_until_written = async |except: &[i64]| {
        wait_until("the rows are written", async || {
            let left = sqlx::query_scalar(not_written).bind(except).fetch_one(pool);
            let left: i64 = left.await.unwrap();
            left == 0
        })
        .await;
    };
    wait_until_written(&HELD_UP).await;
    // Later rows are written, too.
    env.publish((51..=90).chain(HELD_UP)).await;
    wait_until("the later rows are written", async || env.rows().await.contains(&90)).await;
    wait_until("the consumer is ready", async || consumer.missing().is_empty()).await;
    // The new table removes the obstacle of row 8, and the rollback removes those of rows 3 and 5.
    sqlx::query("CREATE TABLE missing (id bigint)").execute(pool).await.unwrap();
    other.rollback().await.unwrap();
    wait_until_written(&[]).await;
    // The second messages of these objects are looked up only after the first ones are settled. A
    // consumer that stops before that gives the second messages back to the queue.
    wait_until("the second messages are looked up", async || {
        HELD_UP.iter().all(|&id| api.lookups_of(id) >= 2)
    })
    .await;
    env.drain(consumer).await;
}

#[tokio::test]
async fn a_consumer_that_stops_gives_back_held_up_rows() {
    let (env, api) = TestEnv::with_all_online().await;
    let consumer = env.start(&api.endpoint(), &[]);
    env.wait_until_migrated().await;
    let mut other = env.database.pool().begin().await.unwrap();
    // Until this insert is committed or rolled back, the consumer cannot write the row.
    sqlx::query("INSERT INTO object VALUES (1, now())").execute(&mut *other).await.unwrap();
    env.publish(1..=2).await;
    env.wait_until_recorded([2]).await;
    wait_until("object 1 was looked up", async || api.lookups_of(1) == 1).await;
    consumer.stop().await;
    assert_eq!(env.ready().await, 1);
}
